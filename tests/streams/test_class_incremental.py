"""Tasks, label views and refusals of class-incremental streams."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from perdure.data.preparation import Preparation
from perdure.data.source import AbsentSplitError
from perdure.errors import DataError, PerdureError, SealedDataError, UsageError
from perdure.labels import IGNORE, TABLE_SIZE, label_space
from perdure.streams.class_incremental import (
    class_incremental,
    learning_order,
    parse_split,
    split_classes,
    task_names,
)
from perdure.streams.description import describe, restore
from perdure.streams.task import merged

NAMES = ["ant", "bee", "cat", "dog", "elk", "traffic light"]
SAMPLES = {
    "s1": [0, 1, IGNORE],
    "s2": [0, 1, 2, 3],
    "s3": [3, 4],
    "s4": [0, 5, 1],
    "s5": [6, 2, 5],
    "s6": [4],
    "s7": [0, IGNORE],
}


@pytest.fixture
def build(make_source, transform):
    """Build a stream over SAMPLES; keyword arguments go to class_incremental, ``source`` replaces the source."""

    def make(source=None, **settings):
        settings = {"base": 3, "step": 1} | settings
        source = source or make_source(NAMES, SAMPLES)
        return class_incremental(source, preparation=transform, **settings)

    return make


def labels(view) -> dict[str, list[int]]:
    return {name: view[i].label[0].tolist() for i, name in enumerate(view.names)}


def test_tasks_of_a_stream(build):
    stream = build()
    assert [t.name for t in stream.tasks] == ["1-3", "dog", "elk", "traffic_light"]
    assert [t.new for t in stream.tasks] == [(1, 2, 3), (4,), (5,), (6,)]
    assert stream.tasks[2].old == (1, 2, 3, 4)
    assert [t.annotated for t in stream.tasks] == [frozenset(t.new) for t in stream.tasks]
    assert all(t.recurs for t in stream.tasks)
    assert stream.groups == ((1, 2, 3), (4,), (5,), (6,))
    assert stream.protocol == "class-incremental 3-1 overlap"
    assert not any(t.recurs for t in build(setting="disjoint").tasks)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("overlap", [["s1", "s2", "s3", "s4", "s5"], ["s3", "s6"], ["s4", "s5"], ["s5"]]),
        ("disjoint", [["s1", "s2"], ["s3", "s6"], ["s4"], ["s5"]]),
        ("partition-rarest", [["s1", "s2", "s3"], ["s6"], ["s4"], ["s5"]]),
    ],
)
def test_images_of_a_task(build, setting, expected):
    stream = build(setting=setting)
    assert [list(t.data.train().names) for t in stream.tasks] == expected
    # validation and test lists are the same in every setting
    assert [list(t.data.validation().names) for t in stream.tasks] == [
        ["s1", "s2", "s3", "s4", "s5"],
        ["s3", "s6"],
        ["s4", "s5"],
        ["s5"],
    ]
    assert [len(t.tests()["test"]) for t in stream.tasks] == [5, 6, 6, 6]


@pytest.mark.parametrize("other", [0, IGNORE])
def test_label_views(build, make_source, other):
    """The remapping table of the protocol, split by split (STAR section 1.4)."""
    stream = build(make_source(NAMES, SAMPLES, other_label=other))
    task = stream.tasks[2]  # teaches 5, knows 1..4, 6 comes later
    with stream.opened(task):
        assert labels(task.train()) == {"s4": [0, 5, 0], "s5": [0, 0, 5]}  # s5 holds 6, 2, 5
        assert labels(task.validation()) == {"s4": [0, 5, other], "s5": [other, other, 5]}
    tests = labels(task.tests()["test"])
    assert tests["s1"] == [0, 1, IGNORE]
    assert tests["s2"] == [0, 1, 2, 3]
    assert tests["s5"] == [other, 2, 5]
    last = labels(stream.tasks[-1].tests()["test"])
    assert last["s5"] == [6, 2, 5]


def test_every_label_of_every_table(build, make_source):
    stream = build(make_source(NAMES, SAMPLES, other_label=IGNORE), base=2, step=2)
    for task in stream.tasks:
        tables = {"train": task.data.train().table, "val": task.data.validation().table}
        tables["test"] = task.tests()["test"].table
        for label in range(TABLE_SIZE):
            kept = label in (0, IGNORE)
            assert tables["train"][label] == (label if kept or label in task.new else 0)
            assert tables["val"][label] == (label if kept or label in task.new else IGNORE)
            assert tables["test"][label] == (label if kept or label in task.seen else IGNORE)


def test_other_label_is_the_sources(build, make_source):
    view = build(make_source(NAMES, SAMPLES, other_label=IGNORE)).tasks[0].tests()["test"]
    assert view.table[6] == IGNORE
    with pytest.raises(UsageError, match="other_label of fake is 7"):
        build(make_source(NAMES, SAMPLES, other_label=7))


def test_permuted_order_moves_classes_not_labels(build):
    stream = build(order=["elk", 2, "ant", "traffic light", "dog", 3])
    assert stream.tasks[0].new == (5, 2, 1)
    assert stream.tasks[-1].seen == (5, 2, 1, 6, 4, 3)
    assert [t.name for t in stream.tasks] == ["1-3", "traffic_light", "dog", "cat"]
    assert stream.protocol.endswith("order given")
    task = stream.tasks[1]
    with stream.opened(task):
        assert labels(task.train()) == {"s5": [6, 0, 0]}
    channels = stream.tasks[-1].channels
    assert channels.ids == (5, 2, 1, 6, 4, 3)
    # going to channels and back is the identity on the labels of a view, whatever the order
    label = torch.as_tensor([5, 2, 1, 6, 4, 3])
    back = np.asarray(channels.ids)[channels.to_channel()[label]]
    assert back.tolist() == label.tolist()


def test_shuffled_order_is_a_function_of_its_seed(build):
    first, again, other = (build(base=6, order="shuffled", order_seed=s) for s in (1, 1, 2))
    assert first.tasks[0].new == again.tasks[0].new
    assert first.tasks[0].new != other.tasks[0].new
    assert sorted(first.tasks[0].new) == [1, 2, 3, 4, 5, 6]
    assert "seed 1" in first.protocol


def test_order_may_leave_classes_out(build):
    stream = build(order=["ant", "cat", "dog", "elk"], base=3)
    assert stream.tasks[-1].seen == (1, 3, 4, 5)
    view = stream.tasks[0].tests()["test"]
    assert view.table[2] == 0 and view.table[6] == 0
    # s5 shows a class that is never taught: that does not make it an image of the future
    disjoint = build(order=["ant", "cat", "dog", "elk"], base=3, setting="disjoint")
    assert disjoint.tasks[1].data.train().names == ("s4", "s5")


def test_past_data_is_closed_even_through_a_kept_view(build):
    stream = build()
    first, second = stream.tasks[:2]
    with pytest.raises(SealedDataError, match="no task is open"):
        first.train()
    with stream.opened(first):
        kept, watched = first.train(), first.validation()
        assert kept[0].name == "s1"
        with pytest.raises(SealedDataError, match="training data of task 2"):
            second.train()
    for view in (kept, watched):
        with pytest.raises(SealedDataError, match="no task is open"):
            view[0]
    with stream.opened(second):
        with pytest.raises(SealedDataError, match="task 2 is open"):
            kept[0]
        with pytest.raises(SealedDataError):
            first.train()
        with pytest.raises(SealedDataError):  # nor does the way that upper bounds take help
            first.data.joint("train")[0]
        assert second.train()[0].name == "s3"
    assert first.tests()["test"][0].name == "s1"  # test data stays open


def test_views_travel_to_worker_processes(build):
    stream = build()
    with stream.opened(stream.tasks[1]) as task:
        view = task.train()
        # the transform of this test lives in conftest and is not importable by name: leave it out
        check = pickle.loads(pickle.dumps(view.check))
        check()
    with pytest.raises(SealedDataError):
        view.check()


def test_monitor_is_not_needed_to_learn(build, make_source):
    stream = build(make_source(NAMES, train=SAMPLES, test=SAMPLES))
    with stream.opened(stream.tasks[0]) as task:
        assert len(task.train()) == 5
        with pytest.raises(DataError, match="no split val"):
            task.validation()


def test_masks_are_read_once(build, make_source, reads):
    source = make_source(NAMES, train=SAMPLES, val={"v": [1, 2]}, test={"t": [1, 2, 6]})
    build(source, base=6)
    assert reads == [("fake", "train"), ("fake", "test")]
    stream = build(source, base=3, step=3, order=[6, 5, 4, 3, 2, 1], setting="overlap")
    stream.tasks[0].data.validation()
    stream.tasks[1].data.validation()
    assert reads == [("fake", "train"), ("fake", "test"), ("fake", "val")]


def test_partition_from_a_file(build, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("s2 0\ns1 0\ns3 1\ns4 2\ns5 3\n")
    stream = build(setting="partition", partition_file=path)
    assert [t.data.train().names for t in stream.tasks] == [("s1", "s2"), ("s3",), ("s4",), ("s5",)]
    assert stream.protocol == "class-incremental 3-1 partition from mine.txt"
    assert not stream.tasks[0].recurs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": 0}, "base is 0, but there are 6 classes"),
        ({"base": 7}, "base is 7, but there are 6 classes"),
        (
            {"base": 2, "step": 3},
            "4 classes are left after base 2: step 3 does not fit\ntry 1, 2, 4, or stream.short_last=true",
        ),
        ({"base": 2, "step": 0}, "step 0 does not fit"),
        ({"setting": "overlapp"}, "unknown setting 'overlapp'\ndid you mean 'overlap'"),
        ({"setting": "partition"}, "setting partition needs partition_file"),
        ({"order": "natral"}, "unknown class order 'natral'\ndid you mean 'natural'"),
        ({"order": []}, "the class order is empty"),
        ({"order": [1, 2, 3, 2]}, "class 'bee' occurs twice in the class order"),
        ({"order": ["ant", "bee", "ant", "dog"]}, "class 'ant' occurs twice"),
        ({"order": ["ant", "bea", "cat"]}, "unknown class 'bea'\ndid you mean 'bee'"),
        ({"order": [1, 2, 9]}, "names class 9, which the data set lacks\nids run from 1 to 6"),
    ],
)
def test_bad_settings(build, settings, message):
    with pytest.raises(UsageError) as caught:
        build(**settings)
    assert message in str(caught.value)


def test_partition_file_without_its_setting(build, tmp_path):
    with pytest.raises(UsageError, match="setting overlap takes no partition_file"):
        build(partition_file=tmp_path / "x.npy")
    with pytest.raises(DataError, match="does not exist"):
        build(setting="partition", partition_file=tmp_path / "x.npy")


def test_task_without_images_is_named(build, make_source):
    few = {"s1": [1], "s2": [2], "s3": [3, 5], "s6": [6]}
    with pytest.raises(DataError, match=r"fake: no training image for task 'dog' \(dog; setting overlap\)"):
        build(make_source(NAMES, few))
    some = {name: lab for name, lab in SAMPLES.items() if name not in ("s5",)} | {"s5": [6, 2]}
    future = some | {"s4": [0, 5, 6]}
    with pytest.raises(DataError, match=r"task 'elk' \(elk; setting disjoint\)"):
        build(make_source(NAMES, future), setting="disjoint")
    with pytest.raises(DataError, match=r"no test image for task 'classes 1 to 3' \(ant, bee, cat;"):
        build(make_source(NAMES, train=SAMPLES, test={"t": [4]}))


@pytest.mark.parametrize(("text", "expected"), [("15-1", (15, 1)), ("100-50", (100, 50)), (" 6 - 1 ", (6, 1))])
def test_split_names(text, expected):
    assert parse_split(text) == expected


@pytest.mark.parametrize("text", ["15", "15-", "a-b", "15-1-1", "", "-1-1", "15.5-1"])
def test_bad_split_names(text):
    with pytest.raises(PerdureError, match="is no split"):
        parse_split(text)


@pytest.mark.parametrize(
    ("classes", "base", "step", "sizes"),
    [
        (20, 15, 1, [15, 1, 1, 1, 1, 1]),
        (20, 5, 3, [5, 3, 3, 3, 3, 3]),
        (150, 100, 10, [100, 10, 10, 10, 10, 10]),
        (150, 50, 50, [50, 50, 50]),
        (19, 13, 6, [13, 6]),
        (20, 20, 0, [20]),
        (20, 20, 7, [20]),
    ],
)
def test_sizes_of_tasks(classes, base, step, sizes):
    groups = split_classes(list(range(1, classes + 1)), base, step)
    assert [len(g) for g in groups] == sizes
    assert [c for g in groups for c in g] == list(range(1, classes + 1))


@pytest.mark.parametrize(
    ("classes", "base", "step", "sizes"),
    [
        (11, 3, 3, [3, 3, 3, 2]),  # OrganAMNIST in CCSI
        (9, 3, 2, [3, 2, 2, 2]),  # PathMNIST: nothing is left
        (10, 4, 100, [4, 6]),
        (10, 10, 3, [10]),
        (10, 1, 8, [1, 8, 1]),
    ],
)
def test_last_task_may_be_short(classes, base, step, sizes):
    ids = list(range(classes, 0, -1))
    groups = split_classes(ids, base, step, short_last=True)
    assert [len(g) for g in groups] == sizes
    assert [c for g in groups for c in g] == ids


def test_short_last_task_of_a_stream(build):
    with pytest.raises(UsageError, match="5 classes are left after base 1: step 2 does not fit"):
        build(base=1, step=2)
    stream = build(base=1, step=2, short_last=True)
    assert [t.name for t in stream.tasks] == ["ant", "2-3", "4-5", "traffic_light"]
    assert stream.groups == ((1,), (2, 3), (4, 5), (6,))
    assert stream.tasks[-1].data.train().table[6] == 6
    with pytest.raises(UsageError, match="step 0 does not fit"):
        build(base=1, step=0, short_last=True)


def test_names_of_tasks_are_padded_and_safe():
    space = label_space([f"c/{i} x" for i in range(150)])
    names = task_names(space, split_classes(space.ids, 100, 10))
    assert names[:3] == ["001-100", "101-110", "111-120"]
    assert task_names(space, split_classes(space.ids, 149, 1))[1] == "c_149_x"


def test_shuffle_does_not_depend_on_the_machine():
    assert learning_order(label_space("abcdefgh"), "shuffled", 3) == (7, 8, 3, 2, 5, 6, 4, 1)


def test_lists_follow_the_order_of_the_source(build, make_source):
    reverse = dict(reversed(SAMPLES.items()))
    view = build(make_source(NAMES, reverse)).tasks[0].data.train()
    assert list(view.names) == ["s5", "s4", "s3", "s2", "s1"]
    assert np.array_equal(view.table[[1, 2, 3, 4]], [1, 2, 3, 0])


POOLS = {"train": SAMPLES, "val": {"v1": [1, 4], "v2": [6], "v3": [0, IGNORE], "v4": [4, 5]}, "test": SAMPLES}


@pytest.fixture
def pooled(build, make_source):
    """Build a stream over POOLS: 2 + 2 + 2 classes, with a pool of the given split."""

    def make(pool="val", **more):
        return build(make_source(NAMES, **POOLS), base=2, step=2, pool=pool, **more)

    return make


def test_pool_grows_with_the_classes_and_hides_every_label(pooled, transform):
    stream = pooled()
    expected = [["v1"], ["v1", "v4"], ["v1", "v2", "v4"]]  # v3 shows no class at all
    for task, names in zip(stream.tasks, expected, strict=True):
        with stream.opened(task):
            pool = task.pool()
            assert list(pool.names) == names and pool.split == "val"
            assert pool.preparation is transform and pool.training
            assert set(pool.table.tolist()) == {IGNORE}
            for i in range(len(pool)):
                assert pool[i].label.unique().tolist() == [IGNORE] and pool[i].image.unique().tolist() == [128]


def test_pool_of_test_images(pooled):
    stream = pooled("test", order=[6, 5, 4, 3, 2, 1])
    with stream.opened(stream.tasks[0]) as task:
        assert list(task.pool().names) == ["s4", "s5"] and task.pool().split == "test"


def test_pool_of_another_source_is_granted_whole_from_the_first_task(pooled, make_source):
    stream = pooled(make_source(NAMES, train={"u2": [6], "u1": [1]}))
    assert stream.protocol == "class-incremental 2-2 overlap, 2 unlabelled images of their own in training"
    for task in stream.tasks:
        with stream.opened(task):
            pool = task.pool()
            assert list(pool.names) == ["u2", "u1"] and pool.source is not task.train().source
            assert set(pool[0].label.unique().tolist()) == {IGNORE}


def test_pool_is_shown_as_training_images_are(make_source):
    class Brighter(Preparation):
        def train(self, case):
            return replace(case, image=case.image.float() + 1, label=case.label.long())

    source = make_source(NAMES, SAMPLES)
    stream = class_incremental(source, base=6, step=1, preparation=Brighter(), pool="val")
    with stream.opened(stream.tasks[0]) as task:
        assert task.pool()[0].image.unique().tolist() == [129]
        assert task.validation()[0].image.unique().tolist() == [128]


def test_pool_is_closed_with_its_task(pooled):
    stream = pooled()
    first, second = stream.tasks[:2]
    with stream.opened(first):
        kept = first.pool()
        kept[0]
        with pytest.raises(SealedDataError, match="training data of task 2 was opened while task 1 is open"):
            second.pool()
    with stream.opened(second), pytest.raises(SealedDataError):
        kept[0]
    with pytest.raises(SealedDataError):
        first.pool()


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (None, ""),
        ("val", ", unlabelled validation images in training"),
        ("test", ", unlabelled test images (transductive) in training"),
    ],
)
def test_pool_stands_in_the_protocol(pooled, pool, words):
    assert pooled(pool).protocol == f"class-incremental 2-2 overlap{words}"
    assert pooled(pool, order="shuffled", order_seed=4).protocol == (
        f"class-incremental 2-2 overlap{words}, order shuffled with seed 4"
    )


def test_without_a_pool_there_is_none(pooled, build):
    stream = pooled(None)
    with stream.opened(stream.tasks[0]) as task:
        assert task.pool() is None


def test_pool_of_a_split_that_is_absent(build, make_source):
    source = make_source(NAMES, train=SAMPLES, test=SAMPLES)
    with pytest.raises(AbsentSplitError, match="fake has no split val"):
        stream = build(source, pool="val")
        with stream.opened(stream.tasks[0]) as task:
            task.pool()


def test_protocol_of_classification_names_no_rule_for_images(build, make_source):
    source = make_source(NAMES, {name: [1 + k % 6] for k, name in enumerate(f"s{k}" for k in range(12))})
    source.kind = "classification"
    assert build(source).protocol == "class-incremental 3-1"
    assert build(source, setting="disjoint", order="shuffled", pool="val").protocol == (
        "class-incremental 3-1, unlabelled validation images in training, order shuffled with seed 0"
    )
    assert build(source, order=[6, 5, 4, 3]).protocol == "class-incremental 3-1, order given"


def test_figures_may_be_measured_on_the_validation_split(build, make_source):
    """All classes seen so far, as test sets have it; the set that training looks at shows the new classes only."""
    held_out = {"v1": [1, 4], "v2": [4, 0], "v3": [6, IGNORE], "v4": [5, 2]}
    source = make_source(NAMES, train=SAMPLES, test=SAMPLES, val=held_out)
    stream = build(source, measured="val")
    assert stream.measured == "val" and build(source).measured == "test"
    third = stream.tasks[2]
    with stream.opened(third):
        assert third.validation().names == ("v4",)
    (name, measured), *others = third.tests().items()
    assert (name, others, measured.split) == ("validation", [], "val")
    assert labels(measured) == {"v1": [1, 4], "v2": [4, 0], "v4": [5, 2]}
    whole = merged(stream)
    assert whole.measured == "val" and set(labels(whole.tasks[0].tests()["validation"])) == set(held_out)
    assert describe(stream, "fake", False).measured == restore(describe(stream, "fake", False)).measured == "val"


def test_unlabelled_images_of_the_measured_split_are_transductive(build, make_source):
    source = make_source(NAMES, train=SAMPLES, test=SAMPLES, val={"v1": [1, 2, 3, 4, 5, 6]})
    assert "transductive" in build(source, measured="val", pool="val").protocol
    assert "transductive" not in build(source, measured="val", pool="test").protocol
    assert "transductive" not in build(source, pool="val").protocol


def test_a_task_without_validation_image_cannot_be_measured_on_them(build, make_source):
    with pytest.raises(DataError, match=r"no validation image for task 'classes 1 to 3'"):
        build(make_source(NAMES, train=SAMPLES, test=SAMPLES, val={"v1": [6]}), measured="val")
