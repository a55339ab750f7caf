"""Reference checkpoints in, this format out. A tool: it never travels to the Hub.

sources    finds a checkpoint and reads it, without running anything in it
converters  which families can be converted; one module a family (`locatvit`) says how
keys       tables of tensor names
convert    the conversion itself, and the folder that it writes
vit        `from_vit`: starting from a ViT of transformers or timm
"""

from .errors import ConversionError

__all__ = ["ConversionError"]
