"""Image files whose pixels fill the memory: small ones made for it, and honest ones."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def png_bomb(side: int = 30_000) -> bytes:
    """A PNG file of `side` x `side` black pixels, one bit each: 900 megapixels in 107 KiB."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + -(-side // 8))
    pixels = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def save_photograph(path: Path, width: int, height: int) -> Path:
    """Smooth colors of `width` x `height` pixels, in the format that the suffix names."""
    colors = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colors).resize((width, height)).save(path)
    return path
