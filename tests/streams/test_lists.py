"""Selection rules on hand-made presence matrices, and the memory of presence matrices."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest

from perdure.errors import DataError
from perdure.labels import IGNORE, TABLE_SIZE
from perdure.streams import lists
from perdure.streams.lists import partition, read_partition

GROUPS = ((1, 2), (3,), (4,))
SAMPLES = {
    "a": [0, 1],
    "b": [0, 1, 3],
    "c": [3, IGNORE],
    "d": [2, 4],
    "e": [3, 4],
    "f": [0, IGNORE],
    "g": [1, 2],
    "h": [4, 9],  # 9 is taught by no task
    "i": [9],
}
#                    a          b          c  d       e          f   g  h
RULES = {
    lists.overlap: [["a", "b", "d", "g"], ["b", "c", "e"], ["d", "e", "h"]],
    lists.disjoint: [["a", "g"], ["b", "c"], ["d", "e", "h"]],
    lists.seen: [
        ["a", "b", "d", "g"],
        ["a", "b", "c", "d", "e", "g"],
        ["a", "b", "c", "d", "e", "g", "h"],
    ],
    # images of class: 1: 3, 2: 2, 3: 3, 4: 3; rarity order 2, 1, 3, 4
    lists.partition_by_rarest: [["a", "b", "d", "g"], ["c", "e"], ["h"]],
}


def matrix(samples=SAMPLES) -> np.ndarray:
    presence = np.zeros((len(samples), TABLE_SIZE), bool)
    for row, labels in enumerate(samples.values()):
        presence[row, labels] = True
    return presence


def named(rows) -> list[list[str]]:
    return [[list(SAMPLES)[r] for r in part] for part in rows]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_on_hand_made_images(rule):
    assert named(rule(matrix(), GROUPS)) == RULES[rule]


def random_matrix(seed: int, images: int = 300, classes: int = 12) -> np.ndarray:
    presence = np.zeros((images, TABLE_SIZE), bool)
    presence[:, 0] = True
    chance = np.linspace(0.02, 0.5, classes)
    presence[:, 1 : classes + 1] = np.random.default_rng(seed).random((images, classes)) < chance
    return presence


@pytest.mark.parametrize("seed", range(5))
def test_rules_keep_their_promises(seed):
    presence = random_matrix(seed)
    order = [int(c) for c in np.random.default_rng(seed).permutation(12) + 1]
    groups = (tuple(order[:6]), tuple(order[6:9]), tuple(order[9:]))
    shown = [set(np.flatnonzero(p)) - {0} for p in presence]
    overlap, disjoint = lists.overlap(presence, groups), lists.disjoint(presence, groups)
    rarest = lists.partition_by_rarest(presence, groups)
    for t, group in enumerate(groups):
        future = {c for g in groups[t + 1 :] for c in g}
        assert list(overlap[t]) == [i for i, s in enumerate(shown) if s & set(group)]
        assert list(disjoint[t]) == [i for i, s in enumerate(shown) if s & set(group) and not s & future]
        assert set(rarest[t]) <= set(overlap[t])
    for parts in (disjoint, rarest):
        together = np.concatenate(parts)
        assert len(set(together)) == len(together)
    assert sorted(np.concatenate(rarest)) == [i for i, s in enumerate(shown) if s]
    assert list(lists.seen(presence, groups)[-1]) == [i for i, s in enumerate(shown) if s]


def test_rarest_class_keeps_all_its_images():
    presence = random_matrix(3)
    counts = presence[:, 1:13].sum(0)
    rare = int(counts.argmin()) + 1
    others = tuple(c for c in range(1, 13) if c != rare)
    base, last = lists.partition_by_rarest(presence, (others, (rare,)))
    assert list(last) == list(np.flatnonzero(presence[:, rare]))
    assert not set(base) & set(last)


def test_second_call_reads_no_mask(make_source, reads):
    source = make_source("abcd", {"x": [0, 1], "y": [2, IGNORE], "z": [3, 4]})
    first = lists.cached_presence(source, "train")
    second = lists.cached_presence(source, "train")
    assert reads == [("fake", "train")]
    assert second.dtype == np.bool_ and second.shape == (3, TABLE_SIZE)
    assert np.array_equal(first, second)
    assert np.argwhere(second).tolist() == [[0, 0], [0, 1], [1, 2], [1, IGNORE], [2, 3], [2, 4]]


def test_cache_follows_the_content(make_source, reads):
    source = make_source("abcd", {"x": [0, 1]})
    lists.cached_presence(source, "train")
    source.splits["train"]["x"] = [0, 3]
    assert lists.cached_presence(source, "train")[0, 3]
    assert len(reads) == 2
    # another split with the very same masks shares the file
    source.splits["val"] = dict(source.splits["train"])
    assert lists.cached_presence(source, "val")[0, 3]
    assert len(reads) == 2


def test_cache_names_no_sample(make_source):
    source = make_source("abcd", {"smith_john": [0, 1]})
    lists.cached_presence(source, "train")
    for path in lists.cache_dir().rglob("*"):
        assert "smith" not in path.name
        assert path.is_dir() or b"smith" not in path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: b"\x80\x04not numbers" + data,
    ],
    ids=["cut", "empty", "flipped bit", "foreign"],
)
def test_damaged_cache_is_computed_again(make_source, reads, damage):
    source = make_source("abcd", {"x": [0, 1], "y": [2]})
    good = lists.cached_presence(source, "train")
    (path,) = lists.cache_dir().rglob("*.bits")
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert np.array_equal(lists.cached_presence(source, "train"), good)
    assert len(reads) == 2
    assert path.read_bytes() == intact


def test_cache_that_cannot_be_written_is_logged(make_source, reads, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("PERDURE_CACHE", str(blocked))
    source = make_source("abcd", {"x": [0, 1]})
    with caplog.at_level(logging.WARNING):
        assert lists.cached_presence(source, "train")[0, 1]
    assert "not remembered" in caplog.text
    assert len(reads) == 1


def test_full_disk_does_not_stop_the_lists(make_source, monkeypatch, caplog):
    def full(path, fill):
        raise lists.PerdureError(f"the disk is full: could not write {path}")

    monkeypatch.setattr(lists, "write_atomic", full)
    assert lists.cached_presence(make_source("ab", {"x": [0, 1]}), "train")[0, 1]
    assert "disk is full" in caplog.text


def test_cache_folder(monkeypatch, tmp_path):
    assert str(lists.cache_dir()).endswith("cache")
    monkeypatch.delenv("PERDURE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert lists.cache_dir() == tmp_path / "perdure"


NAMES = ["img b", "img a", "img c", "img d"]  # not sorted: matrix rows follow sorted names


def test_partition_matrix_follows_lexicographic_names(tmp_path):
    path = tmp_path / "steps.npy"
    np.save(path, np.asarray([[1, 0], [0, 1], [0, 0], [1, 0]], np.int64))
    assert read_partition(path, NAMES, 2).tolist() == [1, 0, -1, 0]


def test_partition_text(tmp_path):
    path = tmp_path / "steps.txt"
    path.write_text("# ours\nimg a 0\n\nimg b  1 # late\nimg d 0\n")
    assert read_partition(path, NAMES, 2).tolist() == [1, 0, -1, 0]


def test_partition_must_show_classes_of_its_task():
    presence = matrix({"p": [1], "q": [3], "r": [1, 3]})
    lists_ok = partition(presence, ((1,), (3,)), np.asarray([0, 1, 1]), "pqr")
    assert [part.tolist() for part in lists_ok] == [[0], [1, 2]]
    with pytest.raises(DataError, match=r"image 'q' \(1 such images\) to task 0, but it shows none"):
        partition(presence, ((1,), (3,)), np.asarray([0, 0, 1]), "pqr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("img a\n", "line 1: expected 'NAME TASK'"),
        ("img a x\n", "expected 'NAME TASK'"),
        ("img a -1\n", "expected 'NAME TASK'"),
        ("img a 0\nimg q 1\n", "line 2: no training image 'img q'"),
        ("img a 2\n", "there is no task 2"),
        ("img a 0\nimg a 1\n", "line 2: image 'img a' occurs twice"),
        ("# nothing\n", "names no image"),
    ],
)
def test_bad_partition_text(tmp_path, text, message):
    path = tmp_path / "steps.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_partition(path, NAMES, 2)


def save_objects(path):
    np.save(path, np.asarray([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: np.save(p, np.zeros((3, 2), int)), r"has shape \(3, 2\), expected \(4, 2\)"),
        (lambda p: np.save(p, np.ones((4, 2), int)), "gives image 'img a' to two tasks"),
        (lambda p: np.save(p, np.full((4, 2), 7)), "other numbers than 0 and 1"),
        (save_objects, "not a readable .npy matrix"),
        (lambda p: p.write_bytes(b"\x80\x04K\x01."), "not a readable .npy matrix"),
        (lambda p: p.write_bytes(b""), "not a readable .npy matrix"),
        (lambda p: np.savez(p.open("wb"), np.zeros((4, 2))), "not a readable .npy matrix"),
        (lambda p: None, "does not exist"),
    ],
    ids=["shape", "twice", "numbers", "objects", "pickle", "empty", "archive", "missing"],
)
def test_bad_partition_matrix(tmp_path, make, message):
    path = tmp_path / "steps.npy"
    make(path)
    with pytest.raises(DataError, match=message):
        read_partition(path, NAMES, 2)
