"""Streams over small real data sets."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from perdure.data.readers.camvid import open_camvid
from perdure.data.readers.voc import open_voc
from perdure.errors import DataError
from perdure.labels import IGNORE, TABLE_SIZE
from perdure.streams import lists
from perdure.streams.class_incremental import class_incremental
from perdure.streams.summary import list_sizes, summarize
from perdure.streams.task import merged

pytestmark = pytest.mark.real


def test_camvid_six_then_one_by_one(shared_data, transform):
    source = open_camvid(shared_data / "camvid")
    stream = class_incremental(source, base=6, step=1, preparation=transform)
    assert [t.name for t in stream.tasks] == [
        "01-06", "sign", "fence", "car", "pedestrian", "bicyclist",
    ]  # fmt: skip
    sizes = list_sizes(stream)
    assert sizes["train"][0] == 367 and sizes["test"][-1] == 233 and sizes["validation"][0] == 101
    # counted independently of the package: raw label k is class k + 1
    folder = shared_data / "camvid" / "trainannot"
    names = (shared_data / "camvid" / "train.txt").read_text().split()
    raw = [set(np.unique(np.asarray(Image.open(folder / f"{name}.png"))).tolist()) for name in names]
    assert sizes["train"][1:] == [sum(label in shown for shown in raw) for label in range(6, 11)]
    last = summarize(stream)["tasks"][-1]
    assert last["without_images"] == []
    assert set(last["shown_by_images"]["train"]["train"]) == {"unlabelled", "bicyclist"}
    with stream.opened(stream.tasks[5]) as task:
        sample = task.train()[0]
        assert sample.image.shape == (3, 180, 240)
        assert set(sample.label.unique().tolist()) <= {0, 11, IGNORE} and 11 in sample.label
    joint = merged(stream)
    with joint.opened(joint.tasks[0]) as task:
        assert len(task.train()) == 367
        assert len(task.train()[0].label.unique()) > 5


def test_camvid_settings_split_the_images(shared_data, transform):
    source = open_camvid(shared_data / "camvid")
    settings = {"base": 6, "step": 5, "preparation": transform}
    parts = class_incremental(source, setting="partition-rarest", **settings)
    assert sum(list_sizes(parts)["train"]) == 367
    presence = lists.cached_presence(source, "train")
    assert presence.shape == (367, TABLE_SIZE) and presence[:, 1:12].any(0).all() and not presence[:, 12:IGNORE].any()


def test_clothes_in_the_voc_layout(shared_data, transform):
    source = open_voc(shared_data / "ccp_voc_layout")
    split = {"preparation": transform}
    presence = lists.cached_presence(source, "train")
    counts = presence.sum(0)
    common = [c for c in np.argsort(-counts, kind="stable").tolist() if c in source.space.ids][:12]
    stream = class_incremental(source, base=8, step=2, order=common, **split)
    sizes = list_sizes(stream)
    assert len(stream) == 3 and sizes["train"][0] == 252
    for task, size in zip(stream.tasks, sizes["train"], strict=True):
        assert size == presence[:, list(task.new)].any(1).sum()
    never = [c for c in source.space.ids if not counts[c]]
    assert len(never) == 6  # 53 labels occur in training, background among them
    with pytest.raises(DataError, match="no training image for task"):
        class_incremental(source, base=8, step=1, order=[*common[:8], never[0]], **split)
