"""Images by their first bytes alone: sizes are known and bounded before anything is decoded."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from serving.security.image_header import check_image
from serving.security.media_url import MediaError


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", width, height) + bytes(5)


def jpeg(width: int, height: int) -> bytes:
    segment = b"\xff\xe0" + struct.pack(">H", 16) + bytes(14)
    return b"\xff\xd8" + segment + b"\xff\xff\xc2\0\x11\x08" + struct.pack(">HH", height, width) + bytes(10)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(3)


def webp(kind: bytes) -> Callable[[int, int], bytes]:
    def make(width: int, height: int) -> bytes:
        if kind == b"VP8X":
            body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        elif kind == b"VP8L":
            body = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little")
        else:
            body = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
        return b"RIFF\0\0\0\0WEBP" + kind + bytes(4) + body
    return make


MAKERS = {"png": png, "jpeg": jpeg, "gif": gif, "vp8x": webp(b"VP8X"), "vp8l": webp(b"VP8L"), "vp8": webp(b"VP8 ")}


@pytest.mark.parametrize("kind", MAKERS)
def test_pixels(kind: str) -> None:
    make = MAKERS[kind]
    assert check_image(make(40, 25), 1000) == (40, 25)
    with pytest.raises(MediaError, match="more than 1000 pixels"):
        check_image(make(91, 11), 1000)
    assert check_image(make(1, 1)) == (1, 1)
    for end in range(len(make(40, 25)) - {"png": 5, "jpeg": 10, "gif": 3}.get(kind, 0)):
        with pytest.raises(MediaError):
            check_image(make(40, 25)[:end])


@pytest.mark.parametrize("content", [
    b"", b"x", png(0, 5), gif(5, 0), b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50), b"\xff\x4f\xff\x51" + bytes(50),
    b"II*\0" + bytes(50), b"BM" + bytes(50), b"icns" + bytes(50), b"8BPS" + bytes(50), b"<svg/>", b"%PDF-1.4",
    b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\0\0" * 9, b"\xff\xd8\xffx", b"\xff\xd8" + b"\xff" * 1000,
], ids=lambda content: repr(content[:12]))
def test_what_is_no_image_here(content: bytes) -> None:
    with pytest.raises(MediaError):
        check_image(content)


def test_real_encoders_agree() -> None:
    import io

    from PIL import Image

    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        buffer = io.BytesIO()
        Image.new("RGB", (37, 21)).save(buffer, kind)
        assert check_image(buffer.getvalue()) == (37, 21)


def test_a_header_walk_is_linear() -> None:
    started_s = time.process_time()
    with pytest.raises(MediaError):
        check_image(b"\xff\xd8" + b"\xff\xe0\0\x02" * 2**20)
    assert time.process_time() - started_s < 3.0
