"""Reference checkpoints in, this format out. A tool: it never travels to the Hub."""

from .errors import ConversionError

__all__ = ["ConversionError"]
