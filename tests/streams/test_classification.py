"""Streams over data sets with one class an image: lists, views, merging, descriptions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from perdure.data.case import collate
from perdure.data.dataset import Draw
from perdure.data.preparation import ClassImage
from perdure.data.readers.class_folders import open_class_folders
from perdure.data.readers.medmnist import open_medmnist
from perdure.data.readers.single_digits import open_single_digits
from perdure.errors import SealedDataError, UsageError
from perdure.labels import IGNORE
from perdure.streams import lists
from perdure.streams.class_incremental import class_incremental
from perdure.streams.description import describe, parse_stream, restore
from perdure.streams.partial_labels import DataSet, partial_labels
from perdure.streams.summary import list_sizes, summarize
from perdure.streams.task import merged

LABELS = {"train": [0, 1, 2, 3, 0, 1, 2, 3, 3], "val": [0, 1, 2, 3], "test": [3, 2, 1, 0, 0]}


def plain(side: int, flip: float = 0.0) -> ClassImage:
    return ClassImage(channels=1, patch=(side, side), mean=(0.0,), std=(1.0,), flip=flip)


PLAIN = plain(10)
BOTH = {"preparation": PLAIN}


@pytest.fixture
def four(tmp_path):
    """Four classes; every pixel of image i of a split has the value i."""
    content = {}
    for split, labels in LABELS.items():
        content[f"{split}_labels"] = np.array(labels)[:, None]
        content[f"{split}_images"] = np.tile(np.arange(len(labels), dtype=np.uint8)[:, None, None], (1, 8, 8))
    np.savez(tmp_path / "four.npz", **content)
    return open_medmnist(tmp_path, file="four.npz", classes=list("abcd"))


@pytest.mark.parametrize("setting", ["overlap", "disjoint", "partition-rarest"])
def test_every_image_is_in_the_task_of_its_class(four, setting) -> None:
    stream = class_incremental(four, base=2, step=1, setting=setting, order=["d", "a", "b", "c"], **BOTH)
    assert [t.new for t in stream.tasks] == [(4, 1), (2,), (3,)]
    assert list_sizes(stream) == {"train": [5, 2, 2], "validation": [2, 1, 1], "test": [3, 4, 5]}
    for task in stream.tasks:
        with stream.opened(task):
            view = task.train()
            samples = [view[k] for k in range(len(view))]
            assert {int(s.label) for s in samples} == set(task.new)
            for sample in samples:
                assert int(sample.label) == LABELS["train"][int(sample.name)] + 1
                assert sample.image[0, 1:9, 1:9].mul(255).round().unique().tolist() == [float(sample.name)]
            batch = collate(samples)
            assert batch.images.shape == (len(view), 1, 10, 10) and batch.images.dtype == torch.float32
            assert batch.labels.shape == (len(view),) and batch.labels.dtype == torch.int64
            tests = task.tests()["test"]
            assert {int(tests[k].label) for k in range(len(tests))} <= set(task.seen)
    with pytest.raises(SealedDataError):
        view[0]


def test_flip_of_a_draw_is_fixed_by_its_seed(four) -> None:
    stream = class_incremental(four, base=4, step=0, preparation=plain(9, 0.5))  # fmt: skip
    with stream.opened(stream.tasks[0]) as task:
        view = task.train()
        shown = [view[Draw(1, seed)].image for seed in range(20)]  # 8 pixels in 9: flipping moves the border
        assert all(torch.equal(a, view[Draw(1, seed)].image) for seed, a in enumerate(shown))
        assert {bool(image[0, 4, 8]) for image in shown} == {True, False}


def test_unlabelled_images_of_a_pool(four) -> None:
    stream = class_incremental(four, base=2, step=2, pool="test", **BOTH)
    with stream.opened(stream.tasks[0]) as task:
        pool = task.pool()
        assert [pool[k].name for k in range(len(pool))] == ["00002", "00003", "00004"]
        assert {int(pool[k].label) for k in range(len(pool))} == {IGNORE}


def test_merged_stream(four) -> None:
    stream = class_incremental(four, base=2, step=1, **BOTH)
    joint = merged(stream)
    (task,) = joint.tasks
    with joint.opened(task):
        view = task.train()
        assert [int(view[k].label) - 1 for k in range(len(view))] == LABELS["train"]
        assert view.source.kind == "classification"
    assert joint.groups == stream.groups


def test_summary_counts_images_of_classes_and_no_background(four) -> None:
    whole = summarize(class_incremental(four, base=2, step=2, **BOTH))
    first, second = whole["tasks"]
    assert first["shown_by_images"]["train"]["train"] == {"a": 2, "b": 2}
    assert second["shown_by_images"]["train"]["train"] == {"c": 2, "d": 3}
    assert second["shown_by_images"]["test"]["test"] == {"a": 2, "b": 1, "c": 1, "d": 1}
    assert first["without_images"] == [] and second["images"]["validation"] == {"validation": 2}


def test_description_says_what_a_label_describes(four) -> None:
    stream = class_incremental(four, base=2, step=2, **BOTH)
    content = describe(stream, "medmnist", four.patients, four.kind).model_dump(mode="json")
    assert content["kind"] == "classification" and content["background"] is None and content["patients"] is True
    again = restore(parse_stream(json.loads(json.dumps(content))))
    assert again.space == stream.space and again.groups == stream.groups
    assert describe(stream, "voc", False).kind == "segmentation"
    del content["kind"]  # written before there were kinds
    assert parse_stream(content).kind == "segmentation"


def test_data_sets_one_after_another(four, tmp_path) -> None:
    digits = open_single_digits(8)
    sets = [DataSet(four, classes=["a", "c"]), DataSet(digits, classes=["zero", "one"], rename={"one": "a"})]
    stream = partial_labels(sets, **BOTH)
    assert [t.new for t in stream.tasks] == [(1, 2), (3,)] and stream.space.background is None
    with stream.opened(stream.tasks[0]) as task:  # images of other classes have no label and are left out
        view = task.train()
        assert [view[k].name for k in range(len(view))] == ["00000", "00002", "00004", "00006"]
        assert [int(view[k].label) for k in range(len(view))] == [1, 2, 1, 2]
        assert len(task.validation()) == 2 and len(task.tests()["four"]) == 3
    with stream.opened(stream.tasks[1]) as task:
        view = task.train()
        assert len(view) == 230 and {int(view[k].label) for k in range(len(view))} == {1, 3}
    joint = merged(stream)  # an image shows nothing but its class, so nothing can be called background
    with joint.opened(joint.tasks[0]) as task:
        view = task.train()
        assert len(view) == 234 and view[0].annotated is None
        assert [view[k].label.shape for k in (0, 200)] == [(), ()]
        assert np.bincount([int(view[k].label) for k in range(234)]).tolist() == [0, 119, 2, 113]
    assert summarize(joint)["tasks"][0]["shown_by_images"]["train"]["train"] == {"a": 119, "c": 2, "zero": 113}


def test_pixels_and_images_do_not_mix(four, make_source) -> None:
    with pytest.raises(UsageError, match="some data sets label pixels and others whole images"):
        partial_labels([DataSet(four), DataSet(make_source("ab", {"x": [1, 2]}))], **BOTH)


def test_two_folders_merged(tmp_path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), len(name)).save(tmp_path / split / name / "1.png")
    one, two = (open_class_folders(tmp_path, channels=1) for _ in range(2))
    stream = merged(partial_labels([DataSet(one, "one", ["ant"]), DataSet(two, "two", ["bee"])], **BOTH))
    with stream.opened(stream.tasks[0]) as task:
        view = task.train()
        assert [view[k].name for k in range(2)] == ["ant/1.png", "bee/1.png"]
        assert [int(view[k].label) for k in range(2)] == [1, 2]


def test_lists_are_remembered(four, reads) -> None:
    first = lists.cached_presence(four, "train")
    again = lists.cached_presence(four, "train")
    assert reads == [("four", "train")] and np.array_equal(first, again)
    assert first.sum(1).tolist() == [1] * 9


@pytest.mark.real
def test_mednist_in_tasks_of_two(shared_data) -> None:
    source = open_medmnist(shared_data / "medmnist_format", file="mednist6_28.npz")
    eval_transform = plain(32)
    stream = class_incremental(source, base=2, step=2, preparation=eval_transform)
    assert list_sizes(stream) == {"train": [2134] * 3, "validation": [268] * 3, "test": [196, 462, 728]}
    with stream.opened(stream.tasks[2]) as task:
        sample = task.train()[0]
        assert sample.image.shape == (1, 32, 32) and not sample.image[:, :2].any() and int(sample.label) in (5, 6)
