"""Small images as they stand in a page."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor

BLACK, WHITE = -0.5, 1.5
"""Values beyond are drawn as these. Images are from 0 to 1, corrupted ones leave that range."""


def data_uri(image: Tensor) -> str:
    """A grey image (height, width) as PNG, in a URI."""
    height, width = image.shape
    levels = ((image - BLACK) / (WHITE - BLACK) * 255).round().clamp(0, 255).int().tolist()
    rows = b"".join(b"\0" + bytes(row) for row in levels)  # 0: the row is not filtered
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of grey
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    file = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)
    return "data:image/png;base64," + base64.b64encode(file).decode("ascii")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
