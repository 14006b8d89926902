"""Streams of data sets with label spaces of their own, and merging."""

from __future__ import annotations

import pytest

from perdure.errors import DataError, SealedDataError, UsageError
from perdure.labels import IGNORE, label_space
from perdure.streams.class_incremental import class_incremental
from perdure.streams.partial_labels import DataSet, global_space, partial_labels
from perdure.streams.task import merged


@pytest.fixture
def hospitals(make_source):
    """Three data sets: liver and kidney; kidney (another id) and spleen; tumour."""
    return [
        DataSet(make_source(["liver", "kidney"], {"p": [0, 1, 2, IGNORE]}, name="north", patients=True)),
        DataSet(make_source(["spleen", "kidney"], {"p": [0, 1, 2], "q": [0, 2]}, name="south")),
        DataSet(make_source(["tumour"], {"r": [1, 0]}, name="east")),
    ]


@pytest.fixture
def build(transform):
    def make(sets, **settings):
        return partial_labels(sets, preparation=transform, **settings)

    return make


def labels(view) -> dict[str, list[int]]:
    return {name: view[i].label[0].tolist() for i, name in enumerate(view.names)}


def test_classes_of_one_name_are_one_class(build, hospitals):
    stream = build(hospitals)
    assert [c.name for c in stream.space.classes] == ["liver", "kidney", "spleen", "tumour"]
    assert [t.name for t in stream.tasks] == ["north", "south", "east"]
    assert [t.new for t in stream.tasks] == [(1, 2), (3,), (4,)]
    assert [t.annotated for t in stream.tasks] == [{1, 2}, {3, 2}, {4}]
    assert stream.groups == ((1, 2), (3,), (4,))
    with stream.opened(stream.tasks[1]) as task:
        assert labels(task.train()) == {"p": [0, 3, 2], "q": [0, 2]}
        assert labels(task.validation()) == {"p": [0, 3, 2], "q": [0, 2]}
    with pytest.raises(SealedDataError):
        stream.tasks[0].train()


def test_one_test_set_a_task_seen_so_far(build, hospitals):
    stream = build(hospitals)
    assert [list(t.tests()) for t in stream.tasks] == [["north"], ["north", "south"], ["north", "south", "east"]]
    tests = stream.tasks[-1].tests()
    assert labels(tests["north"]) == {"p": [0, 1, 2, IGNORE]}
    assert labels(tests["south"]) == {"p": [0, 3, 2], "q": [0, 2]}
    assert labels(tests["east"]) == {"r": [4, 0]}


def test_offset_gives_every_set_its_own_ids(build, hospitals):
    stream = build(hospitals, union="offset")
    assert [t.new for t in stream.tasks] == [(1, 2), (3, 4), (5,)]
    assert [c.name for c in stream.space.classes] == [
        "north: liver",
        "north: kidney",
        "south: spleen",
        "south: kidney",
        "east: tumour",
    ]
    assert len({c.color for c in stream.space.classes}) == 5
    with stream.opened(stream.tasks[1]) as task:
        assert labels(task.train()) == {"p": [0, 3, 4], "q": [0, 4]}


def test_published_offsets(make_source):
    """Cardiac, fundus and prostate with 3, 2 and 1 classes: offsets 0, 3, 5 and, in another order, 0, 1, 3."""
    organs = {"cardiac": ["rv", "myo", "lv"], "fundus": ["rim", "cup"], "prostate": ["gland"]}
    sets = {name: DataSet(make_source(classes, {"x": [1]}, name=name)) for name, classes in organs.items()}

    def offsets(*order):
        return [min(m.values()) - 1 for m in global_space([sets[name] for name in order], "offset")[1]]

    assert offsets("cardiac", "fundus", "prostate") == [0, 3, 5]
    assert offsets("prostate", "fundus", "cardiac") == [0, 1, 3]


def test_rename_and_choice_of_classes(build, make_source):
    one = DataSet(make_source(["Leber", "Niere", "Milz"], {"x": [1, 2, 3]}, name="eins", other_label=IGNORE),
                  classes=["Milz", "Leber"], rename={"Leber": "liver"})  # fmt: skip
    two = DataSet(make_source(["liver"], {"y": [1]}, name="two"), name="second set")
    stream = build([one, two])
    assert [c.name for c in stream.space.classes] == ["Milz", "liver"]
    assert [t.name for t in stream.tasks] == ["eins", "second_set"]
    assert stream.tasks[1].new == () and stream.tasks[1].annotated == {2}
    with stream.opened(stream.tasks[0]) as task:
        assert labels(task.train()) == {"x": [2, 0, 1]}  # a class outside the choice is background in training
        assert labels(task.validation()) == {"x": [2, IGNORE, 1]}


def test_same_classes_again_is_a_domain_stream(build, make_source):
    sets = [DataSet(make_source(["gland"], {"x": [1, 0]}, name=n)) for n in ("mr", "us")]
    stream = build(sets)
    assert [t.new for t in stream.tasks] == [(1,), ()]
    assert [t.annotated for t in stream.tasks] == [{1}, {1}]
    assert stream.tasks[1].seen == (1,)


def test_one_source_in_two_tasks_recurs(build, make_source):
    source = make_source(["a", "b"], {"x": [1, 2]})
    stream = build([DataSet(source, "first", ["a"]), DataSet(source, "second", ["b"])])
    assert all(t.recurs for t in stream.tasks)
    assert [t.new for t in stream.tasks] == [(1,), (2,)]


def test_bad_data_sets(build, make_source):
    def source(**more):
        return make_source(["a", "b"], {"x": [1]}, **more)

    cases = [
        ([], "the stream has no data set"),
        ([DataSet(source()), DataSet(source())], "two data sets are named 'fake'"),
        ([DataSet(source(), classes=["c"])], "unknown class 'c'"),
        ([DataSet(source(), classes=["a", "a"])], "fake: class 'a' occurs twice"),
        ([DataSet(source(), classes=[])], "fake: no class is annotated"),
        ([DataSet(source(), rename={"q": "r"})], "rename names class 'q'"),
        ([DataSet(source(), rename={"a": "b"})], "class 'b' occurs twice"),
    ]
    for sets, message in cases:
        with pytest.raises(UsageError) as caught:
            build(sets)
        assert message in str(caught.value)
    with pytest.raises(UsageError, match="unknown union 'name'"):
        build([DataSet(source())], union="name")
    with pytest.raises(UsageError, match="elsewhere"):
        build([DataSet(source())], elsewhere="maybe")
    with pytest.raises(DataError, match="fake: the train split is empty"):
        build([DataSet(make_source(["a"], train={}, test={"x": [1]}))])
    with pytest.raises(DataError, match="no split test"):
        build([DataSet(make_source(["a"], train={"x": [1]}))])


SAMPLES = {"s1": [0, 1, IGNORE], "s2": [2, 3], "s3": [3, 4], "s4": [1, 4], "s5": [0, IGNORE]}


def test_merged_class_incremental_stream(make_source, transform):
    source = make_source("abcd", SAMPLES, other_label=IGNORE)
    split = {"preparation": transform}
    parts = class_incremental(source, base=2, step=1, **split)
    whole = merged(parts)
    assert len(whole) == 1
    (task,) = whole.tasks
    assert task.new == task.seen == (1, 2, 3, 4) and task.old == ()
    assert task.annotated == {1, 2, 3, 4} and not task.recurs
    assert whole.groups == parts.groups == ((1, 2), (3,), (4,))
    assert whole.protocol == "class-incremental 2-1 overlap, merged"
    with pytest.raises(SealedDataError):
        task.train()
    with whole.opened(task):
        kept = task.train()
        # images recur in the tasks, each is here once, with every label
        assert labels(kept) == {"s1": [0, 1, IGNORE], "s2": [2, 3], "s3": [3, 4], "s4": [1, 4]}
        assert labels(task.validation()) == labels(kept)
    with pytest.raises(SealedDataError):
        kept[0]
    assert labels(task.tests()["test"]) == labels(parts.tasks[-1].tests()["test"])
    assert kept.table[9] == 0


def test_merged_stream_holds_the_images_of_its_tasks_only(make_source, transform):
    settings = {"preparation": transform}
    parts = class_incremental(make_source("abcd", SAMPLES), base=1, step=1, order=[1, 2], **settings)
    with (whole := merged(parts)).opened(whole.tasks[0]) as task:
        assert labels(task.train()) == {"s1": [0, 1, IGNORE], "s2": [2, 0], "s4": [1, 0]}


@pytest.mark.parametrize("elsewhere", ["absent", "unlabelled"])
def test_merged_data_sets(build, hospitals, elsewhere):
    whole = merged(build(hospitals, elsewhere=elsewhere))
    with whole.opened(whole.tasks[0]) as task:
        joined = task.train()
        shown = [(case.name, case.label[0].tolist()) for case in (joined[k] for k in range(len(joined)))]
        assert shown == [("p", [0, 1, 2, IGNORE]), ("p", [0, 3, 2]), ("q", [0, 2]), ("r", [4, 0])]
        known = [joined[k].annotated for k in range(4)]
        # of which labels a sample can tell: all where other classes cannot be there, else those of its data set
        assert known == ([None] * 4 if elsewhere == "absent" else [{1, 2}, {3, 2}, {3, 2}, {4}])
    with pytest.raises(SealedDataError):
        joined[0]
    tests = whole.tasks[0].tests()
    assert list(tests) == ["north", "south", "east"]
    assert tests["south"].annotated == (None if elsewhere == "absent" else {2, 3})


def test_background_name_of_mixed_sets(make_source):
    plain = make_source(["a"], {"x": [1]}, name="p")
    full = make_source([], {"x": [1]}, name="f", space=label_space(["b"], background=None))
    assert global_space([DataSet(plain), DataSet(full)])[0].background == "background"
    assert global_space([DataSet(full)])[0].background is None
