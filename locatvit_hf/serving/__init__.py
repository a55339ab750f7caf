"""A page to try checkpoints on pictures, on this machine or as a Space of the Hub."""

from .page import build_page, serve
from .space import write_space

__all__ = ["build_page", "serve", "write_space"]
