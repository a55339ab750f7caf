"""Checkpoints of the references and of timm in, this format out. A tool, not remote code.

readers      finds a checkpoint and reads it, without running anything in it
converters   which families can be converted; one module per family (`locatvit`) says how
key_mapping  tables of tensor names
convert      the conversion itself, and the folder that it writes
vit          `from_vit`: starting from a ViT of transformers or timm
"""

from .errors import ConversionError

__all__ = ["ConversionError"]
