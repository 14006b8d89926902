"""Places in which a format holds bytes that its readers pass over: each is found."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from perdure.audit.formats import events_problem, png_problem, read_safetensors
from perdure.audit.texts import _changes_problem
from perdure.metrics.changes import BEFORE, OUTPUTS
from perdure.metrics.confusion import ConfusionMatrix, write_counts

NOTE = b"Jane Doe, born 1950 "


def png(mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    Image.new(mode, (4, 4)).save(content, "PNG", optimize=True)
    return content.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_pictures_pass(mode: str) -> None:
    assert png_problem(png(mode)) is None


@pytest.mark.parametrize(
    ("mode", "more", "told"),
    [
        ("RGB", chunk(b"PLTE", NOTE * 3), "more than its pixels"),
        ("P", chunk(b"PLTE", NOTE * 3) * 2, "more than its pixels"),
        ("P", chunk(b"PLTE", NOTE * 60), "more than its pixels"),
        ("RGB", chunk(b"IHDR", NOTE) + png()[8:33], "damaged"),
        ("RGB", chunk(b"tEXt", NOTE), "chunk 'tEXt'"),
    ],
    ids=["palette-of-no-use", "second-palette", "long-palette", "second-header", "text"],
)
def test_picture_with_more(mode: str, more: bytes, told: str) -> None:
    picture = png(mode)
    problem = png_problem(picture[:33] + more + picture[33:])
    assert problem is not None
    assert told in problem


def test_tensors_pass(tmp_path: Path) -> None:
    save_file({"a": torch.rand(3), "größe": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    found, problem = read_safetensors(tmp_path / "x.safetensors")
    assert problem is None
    assert {name: entry["shape"] for name, entry in found.items()} == {"a": [3], "größe": [2, 2]}


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: '{"a":{"dtype":"Jane Doe","shape":[],"data_offsets":[0,0]},' + header[1:],
        lambda header: header.replace('"dtype"', '"dtype":"Jane Doe","dtype"'),
        lambda header: header.replace(":", ":\t   ", 1),
        lambda header: "\n" + header,
    ],
    ids=["tensor-twice", "key-twice", "spaces", "line"],
)
def test_header_with_more(edit: Callable[[str], str], tmp_path: Path) -> None:
    header = edit(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, separators=(",", ":")))
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4))
    assert read_safetensors(tmp_path / "x.safetensors")[1] == "has a header that is not as it was written"


def varint(number: int) -> bytes:
    *rest, last = (number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7))
    return bytes([part | 128 for part in rest] + [last])


def part(field: int, content: bytes) -> bytes:
    """A field of a message: bytes with their length."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def record(event: bytes) -> bytes:
    return struct.pack("<Q", len(event)) + bytes(4) + event + bytes(4)


TIME = varint(1 << 3 | 1) + struct.pack("<d", 1.0)
STEP = varint(2 << 3) + varint(300)
LOSS = part(1, b"loss") + varint(2 << 3 | 5) + struct.pack("<f", 0.5)


def test_figures_pass() -> None:
    assert (
        events_problem(record(TIME + part(3, b"brain.Event:2")) + record(TIME + STEP + part(5, part(1, LOSS)))) is None
    )


@pytest.mark.parametrize(
    "event",
    [
        part(1, NOTE),
        part(2, NOTE),
        part(3, NOTE),
        part(4, NOTE),
        part(5, part(1, part(1, b"loss") + part(2, NOTE))),
        part(5, part(1, LOSS + varint(2 << 3 | 5) + NOTE[:4])),
        part(5, part(1, LOSS + part(1, NOTE))),
        part(5, part(1, LOSS + part(9, NOTE))),
        part(5, part(2, NOTE)),
        varint(2 << 3) + b"\xff" * 300 + b"\1",
        b"",
    ],
    ids=[
        "time",
        "step",
        "version",
        "field",
        "number",
        "two-numbers",
        "two-tags",
        "metadata",
        "summary",
        "long",
        "empty",
    ],
)
def test_event_with_more(event: bytes) -> None:
    assert events_problem(record(TIME + STEP + part(5, part(1, LOSS))) + record(event)) is not None


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ([[50, 5], [4, 11]], None),
        ([[50, 5], [5, 11]], "has other voxels of earlier classes in its ground truth than counts.json"),
        ([[60, 5], [4, 11]], "its two tables do not count the same voxels"),
    ],
)
def test_counts_of_a_change_are_of_the_test_cases(before: list[list[int]], told: str | None, tmp_path: Path) -> None:
    """An earlier class (1) that is labelled again, a new one (2): 55, 15 and 10 voxels in the ground truth."""
    own = ConfusionMatrix((0, 1, 2), np.array([[53, 1, 1], [3, 12, 0], [2, 0, 8]]), cases=1)
    outputs = ConfusionMatrix((0, 1, 2), np.array([[55, 0, 4], [2, 13, 6], [0, 0, 0]]), cases=1)
    write_counts(tmp_path / "counts.json", {"b": own})
    write_counts(
        tmp_path / "changes.json", {OUTPUTS: outputs, BEFORE: ConfusionMatrix((0, 1), np.array(before), cases=1)}
    )
    assert _changes_problem(tmp_path / "changes.json") == told
