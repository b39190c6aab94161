"""Reads an image's size from its first bytes, so that an image that is too large never reaches a decoder.

Only formats that are named here are images at all: a decoder that nobody needs (JPEG 2000, TIFF, ICNS, ...) is one
whose bugs nobody can use.
"""

from __future__ import annotations

import struct

from serving.limits import BY_NAME
from serving.security.media_url import MediaError

MAX_PIXELS = BY_NAME["MAX_MEDIA_PIXELS"].default
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, in its thirteen kinds
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


def check_image(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of a PNG, JPEG, GIF or WebP image. Raises MediaError if it is none, or too large."""
    try:
        width, height = _size(content)
    except (struct.error, IndexError):
        raise MediaError("the image is cut short") from None
    if width < 1 or height < 1:
        raise MediaError("the image has no pixels")
    if width * height > max_pixels:
        raise MediaError(f"the image has more than {max_pixels} pixels ({width} x {height})")
    return width, height


def _size(content: bytes) -> tuple[int, int]:
    if content.startswith(b"\x89PNG\r\n\x1a\n") and content[12:16] == b"IHDR":
        return struct.unpack(">II", content[16:24])  # type: ignore[return-value]
    if content.startswith((b"GIF87a", b"GIF89a")):
        return struct.unpack("<HH", content[6:10])  # type: ignore[return-value]
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _webp_size(content)
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(content)
    raise MediaError("the image is neither PNG nor JPEG, GIF or WebP")


def _webp_size(content: bytes) -> tuple[int, int]:
    kind = content[12:16]
    if kind == b"VP8X":
        return (1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(_exactly(content, 27, 3), "little"))
    if kind == b"VP8L" and content[20] == 0x2F:
        bits = int.from_bytes(_exactly(content, 21, 4), "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", content[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise MediaError("the image is not a WebP image that can be read")


def _exactly(content: bytes, at: int, length: int) -> bytes:
    if len(content) < at + length:
        raise IndexError
    return content[at:at + length]


def _jpeg_size(content: bytes) -> tuple[int, int]:
    """Walk the segments up to the frame's head: each says its length, so the walk is linear."""
    at = 2
    while True:
        if content[at] != 0xFF:
            raise MediaError("the image is not a JPEG image that can be read")
        while content[at] == 0xFF:  # fill bytes
            at += 1
        marker = content[at]
        at += 1
        if marker in _JPEG_BARE:
            continue
        if marker in _JPEG_SIZES:
            height, width = struct.unpack(">HH", content[at + 3:at + 7])
            return width, height
        if marker in (0xD9, 0xDA):  # the end, or image data without a head
            raise MediaError("the image is not a JPEG image that can be read")
        (length,) = struct.unpack(">H", content[at:at + 2])
        if length < 2:
            raise MediaError("the image is not a JPEG image that can be read")
        at += length
