"""File formats, read so strictly that nothing can hide in them: no text chunks, no metadata, no bytes at the end."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from typing_extensions import TypedDict

PNG_START: Final = b"\x89PNG\r\n\x1a\n"
MOST_SIDE: Final = 1 << 16
MOST_PIXELS: Final = 1 << 28
"""Sides and pixels of a picture that is looked into: a header can say any size, and a few bytes unpack to it."""
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_BYTES: Final = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_NAMES: Final = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SIZES: Final = {_NAMES[code]: size for code, size in _BYTES.items()}
"""Bytes of one number by the name of torch's type."""


class Found(TypedDict):
    """A tensor in a file: shape, torch's name of its type, hex SHA-256 of its bytes, whether its numbers are finite."""

    shape: list[int]
    dtype: str
    sha256: str
    finite: bool


def png_problem(content: bytes) -> str | None:
    """What a PNG holds besides one picture, in words; ``None`` if nothing."""
    if not content.startswith(PNG_START):
        return "is not a PNG picture"
    at, packed, header, palette, ended = len(PNG_START), b"", b"", b"", False
    while at + 12 <= len(content) and not ended:
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        crc = content[at + 8 + length : at + 12 + length]
        if len(body) != length or crc != struct.pack(">I", zlib.crc32(kind + body)):
            return "is a damaged PNG picture"
        if kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"IEND" and length):
            return f"is a PNG picture with a chunk '{kind.decode('latin-1')}' besides the picture"
        if (kind == b"IHDR") != (at == len(PNG_START)):
            return "is a damaged PNG picture"
        # a reader passes over a second palette, a long one, and one of a picture that names no colours by number
        if kind == b"PLTE" and (palette or length > 768 or header[9:10] != b"\x03"):
            return "is a PNG picture with more than its pixels in it"
        header = body if kind == b"IHDR" else header
        palette = body if kind == b"PLTE" else palette
        packed += body if kind == b"IDAT" else b""
        at, ended = at + 12 + length, kind == b"IEND"
    if not ended or len(header) != 13:
        return "is a damaged PNG picture"
    if at < len(content):
        return f"is a PNG picture with {len(content) - at:,} bytes behind its end"
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if color not in _CHANNELS or interlaced:
        return "is not a PNG picture as this program writes them"
    if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
        return f"is a PNG picture of {width:,} by {height:,} pixels, too large to be one of a run"
    size = height * (1 + -(-width * bits * _CHANNELS[color] // 8))
    try:
        unpack = zlib.decompressobj()
        pixels = unpack.decompress(packed, size + 1)
    except zlib.error:
        return "is a damaged PNG picture"
    if len(pixels) != size or not unpack.eof or unpack.unused_data or unpack.unconsumed_tail:
        return "is a PNG picture with more than its pixels in it"
    return None


def read_safetensors(path: Path) -> tuple[dict[str, Found], str | None]:
    """Tensors of a safetensors file by name, and what is wrong with the file, in words (``None``: nothing)."""
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        size = path.stat().st_size
        if not 2 <= length <= size - 8:
            return {}, "is not a safetensors file"
        text = stream.read(length)
        try:
            header = json.loads(text)
            again = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if again != text.rstrip(b" "):  # a key that stands twice, or spaces between the words, can hold anything
                return {}, "has a header that is not as it was written"
            metadata = header.pop("__metadata__", {})
            places = sorted((tuple(entry["data_offsets"]), name) for name, entry in header.items())
            found: dict[str, Found] = {}
            at, wrong = 0, "holds metadata besides its tensors" if metadata else None
            for (start, end), name in places:
                code, shape = header[name]["dtype"], header[name]["shape"]
                count = _BYTES[code]
                for side in shape:
                    count *= side
                if start != at or end - start != count:
                    return found, "holds bytes that belong to no tensor"
                digest, finite = hashlib.sha256(), True
                for block in _blocks(stream, count):
                    digest.update(block)
                    finite = finite and _is_finite(block, code)
                found[name] = {
                    "shape": list(shape),
                    "dtype": _NAMES[code],
                    "sha256": digest.hexdigest(),
                    "finite": finite,
                }
                at = end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}, "is not a safetensors file"
    if at != size - 8 - length or len(text) - len(text.rstrip(b" ")) > 7:
        wrong = "holds bytes that belong to no tensor"
    known = {"dtype", "shape", "data_offsets"}
    if any(set(entry) != known for entry in header.values()):
        wrong = "holds metadata besides its tensors"
    return found, wrong


def _is_finite(block: bytes, code: str) -> bool:
    """Whether no number is NaN or infinite, by their bits: numpy has no bfloat16. Types of 8 bits are not looked at."""
    known = {
        "F64": ("<u8", 0x7FF << 52),
        "F32": ("<u4", 0xFF << 23),
        "F16": ("<u2", 0x1F << 10),
        "BF16": ("<u2", 0xFF << 7),
    }
    if code not in known:
        return True
    kind, exponent = known[code]
    bits = np.frombuffer(block, kind)
    return not bool(((bits & bits.dtype.type(exponent)) == exponent).any())


def _blocks(stream: BinaryIO, count: int) -> Iterator[bytes]:
    """The next bytes of a file in pieces: tensors may be larger than memory. ValueError if the file ends before."""
    while count > 0:
        block = stream.read(min(count, 1 << 20))  # whole numbers: files give all that is asked for up to their end
        if not block:
            raise ValueError
        count -= len(block)
        yield block


def events_problem(content: bytes) -> str | None:
    """What a TensorBoard event file holds besides figures, in words; ``None`` if nothing.

    Read by hand, because TensorBoard need not be installed where a run is audited: records are length, checksum, event,
    checksum; an event is fields of protocol buffers (1 time, 2 step, 3 version, 5 summary).
    """
    at = 0
    try:
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = content[at + 12 : at + 12 + length]
            if not event or len(event) != length or at + 16 + length > len(content):
                return "is a damaged event file"
            at += 16 + length
            for field, value in _fields(event):
                if field == 5 and isinstance(value, bytes):
                    for inner, scalar in _fields(value):
                        if inner != 1 or not isinstance(scalar, bytes) or not _is_scalar(scalar):
                            return "holds other things than figures"
                elif not (
                    (field == 1 and isinstance(value, bytes) and len(value) == 8)
                    or (field == 2 and isinstance(value, int))
                    or (field == 3 and value == b"brain.Event:2")
                ):
                    return "holds other things than figures"
    except (struct.error, ValueError, IndexError):
        return "is no event file"
    return None


def _is_scalar(content: bytes) -> bool:
    """Whether a value of a summary is a tag (1) with a number (2) of 4 bytes, each once."""
    values = sorted(_fields(content), key=lambda pair: pair[0])
    if [field for field, _ in values] != [1, 2]:
        return False
    tag, number = (value for _, value in values)
    return isinstance(tag, bytes) and len(tag) <= 200 and isinstance(number, bytes) and len(number) == 4


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a message of protocol buffers: number, and value (bytes for all but variable-length integers)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if shift > 70:  # longer than any integer of 64 bits
                raise ValueError
            if byte < 128:
                return value

    while at < len(content):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) if kind != 2 else varint()
        if size is None or at + size > len(content):
            raise ValueError
        yield key >> 3, content[at : at + size]
        at += size
