"""The published counts are consistent in themselves, and comparing with them works."""

from __future__ import annotations

import pytest

from perdure.errors import DataError, UsageError
from perdure.streams.class_incremental import parse_split, split_classes
from perdure.streams.published import (
    compare_counts,
    datasets,
    published,
    published_counts,
    published_left_out,
)

CLASSES = {"voc": 20, "ade20k": 150}


def entries():
    for dataset in datasets():
        content = published(dataset)
        for name, entry in content["splits"].items():
            yield dataset, content["images"], name, entry
        for order in content.get("orders", {}).values():
            for name, entry in order["splits"].items():
                yield dataset, content["images"], name, entry


def test_files():
    assert datasets() == ["ade20k", "voc"]
    assert all(published(name)["dataset"] == name for name in datasets())
    assert set(published("voc")["splits"]) == {"19-1", "15-5", "15-1", "10-1", "5-3"}
    assert set(published("ade20k")["splits"]) == {"100-50", "100-10", "100-5", "50-50"}


def test_every_list_has_one_number_a_step_and_fits_the_data_set():
    seen = 0
    for dataset, images, name, entry in entries():
        steps = len(split_classes(range(1, CLASSES[dataset] + 1), *parse_split(name)))
        for split in {"validation", "test"} & set(entry):
            counts = entry[split]
            assert len(counts) == steps and max(counts) <= images[split]
        if "test" in entry:
            assert entry["test"] == sorted(entry["test"])
            assert entry["test"][-1] == images["test"]
        for setting, counts in entry["train"].items():
            seen += 1
            assert len(counts) == steps
            if setting == "overlap":
                assert max(counts) <= images["train"] <= sum(counts)
            if setting == "disjoint":
                assert sum(counts) <= images["train"]
                assert all(d <= o for d, o in zip(counts, entry["train"]["overlap"], strict=True))
    assert seen == 8 + 4 + 3 + 3


def test_voc_disjoint_lists_hold_every_image():
    # without overlap every augmented image with a class is in exactly one step
    for name in ("19-1", "15-5", "15-1"):
        assert sum(published_counts("voc", name, "disjoint")["train"]) == 10582


def test_partitions_leave_out_fourteen_images():
    content = published("ade20k")
    left_out = published_left_out("ade20k")
    assert len(left_out) == len(set(left_out)) == 14 and left_out == sorted(left_out)
    assert left_out[0] == 5148 and left_out[-1] == 19872
    orders = [content["splits"], content["orders"]["b"]["splits"]]
    for splits in orders:
        for entry in splits.values():
            if "partition" in entry["train"]:
                assert sum(entry["train"]["partition"]) == 20210 - 14
    assert published_left_out("voc") is None and published_left_out("camvid") is None


def test_related_splits_agree():
    voc, ade = published("voc")["splits"], published("ade20k")["splits"]
    assert voc["15-1"]["test"][-1] == voc["15-5"]["test"][-1] == 1449
    assert voc["15-1"]["train"]["overlap"][0] == voc["15-5"]["train"]["overlap"][0]
    assert voc["10-1"]["train"]["overlap"][-5:] == voc["15-1"]["train"]["overlap"][1:]
    assert voc["10-1"]["test"][-6:] == voc["15-1"]["test"]
    assert sum(ade["100-10"]["train"]["partition"][1:]) == ade["100-50"]["train"]["partition"][1]
    assert ade["100-50"]["train"]["overlap"][1] == ade["50-50"]["train"]["overlap"][2]


def test_order_b_is_a_permutation():
    assert sorted(published("ade20k")["orders"]["b"]["ids"]) == list(range(1, 151))
    counts = published_counts("ade20k", "50-50", "partition", order="b")
    assert counts == {"train": [6659, 7483, 6054]}
    assert published_counts("ade20k", "50-50", "partition", order="z") == {}


def test_compare():
    ours = {"train": [9568, 2144], "validation": None, "test": [1240, 1449]}
    rows = compare_counts(ours, "voc", "15-5", "overlap")
    assert rows == [
        (0, "train", 9568, 9568, True),
        (1, "train", 2145, 2144, False),
        (0, "test", 1240, 1240, True),
        (1, "test", 1449, 1449, True),
    ]
    disjoint = compare_counts(ours, "voc", "15-5", "disjoint")
    assert disjoint[0] == (0, "train", 8437, 9568, False)


@pytest.mark.parametrize(
    ("dataset", "split", "setting"),
    [("camvid", "6-1", "overlap"), ("voc", "7-13", "overlap"), ("ade20k", "100-5", "nonsense")],
)
def test_nothing_published_nothing_compared(dataset, split, setting):
    assert compare_counts({"train": [1, 2]}, dataset, split, setting) == []


def test_our_own_partition_is_not_compared_with_a_published_one():
    known = published_counts("ade20k", "100-50", "partition-rarest")
    assert "train" not in known and known["test"] == [2000, 2000]


def test_other_number_of_steps():
    with pytest.raises(DataError, match="voc 15-5 has 2 published steps, but 3 here"):
        compare_counts({"train": [1, 2, 3]}, "voc", "15-5", "overlap")
    with pytest.raises(UsageError, match="did you mean 'voc'"):
        published("vok")
