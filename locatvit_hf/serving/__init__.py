"""A page to try checkpoints on images, on this machine or as a Space of the Hub."""

from .app import build_app, serve
from .space import write_space

__all__ = ["build_app", "serve", "write_space"]
