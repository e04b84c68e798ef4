"""What a picture's file says about itself."""

import struct
from pathlib import Path


def png_size(path: Path) -> tuple[int, int]:
    """Return width and height of a PNG, in pixels."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    return width, height
