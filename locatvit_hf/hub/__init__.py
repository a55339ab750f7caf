"""Publishing: the card of a checkpoint, its repository, and what is in one before anyone runs its code."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`CardCallback`, when somebody asks for it: it needs accelerate."""
    if name != "CardCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .callback import CardCallback

    return CardCallback


__all__ = ["CardCallback"]
