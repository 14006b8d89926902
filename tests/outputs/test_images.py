"""Masks in 8 and 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure.data.readers.imagefiles import read_index_mask
from perdure.labels import ClassInfo, LabelSpace
from perdure.outputs.images import write_masks

SPACE = LabelSpace(tuple(ClassInfo(k, f"c{k}", color=(k % 256, k // 256, 7)) for k in (1, 2, 254, 255, 300, 4094)))


@pytest.mark.parametrize(("largest", "modes"), [(254, ("L", "P")), (255, ("I;16", "RGB")), (4094, ("I;16", "RGB"))])
def test_format_follows_the_largest_id_and_not_the_image(tmp_path: Path, largest: int, modes: tuple[str, str]) -> None:
    for name, ids in (("all", [0, *(k for k in SPACE.ids if k <= largest)]), ("few", [0, 2])):
        labels = np.tile(np.asarray(ids, np.int16), (3, 1))
        files = write_masks(tmp_path, name, labels, SPACE, largest)
        assert files == [tmp_path / "index" / f"{name}.png", tmp_path / "color" / f"{name}.png"]
        with Image.open(files[0]) as index, Image.open(files[1]) as color:
            assert (index.mode, color.mode) == modes
            np.testing.assert_array_equal(np.asarray(color.convert("RGB")), SPACE.palette()[labels])
        np.testing.assert_array_equal(read_index_mask(files[0]), labels)
