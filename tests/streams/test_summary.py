"""A stream described for checks and for the run folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from perdure.data.preparation import Preparation
from perdure.errors import DataError, SealedDataError, UsageError
from perdure.labels import IGNORE
from perdure.streams.class_incremental import class_incremental
from perdure.streams.description import describe, parse_stream, read_stream, restore, write_stream
from perdure.streams.partial_labels import DataSet, partial_labels
from perdure.streams.summary import left_out_rows, list_sizes, summarize
from perdure.streams.task import merged

SAMPLES = {"s1": [0, 1, IGNORE], "s2": [2, 3], "s3": [3, 4], "s4": [1, 4], "s5": [0, IGNORE], "s6": [5, 1]}


@pytest.fixture
def split(transform):
    return {"preparation": transform}


@pytest.fixture
def stream(make_source, split):
    return class_incremental(make_source("abcd", SAMPLES), base=2, step=1, order=[1, 2, 3], **split)


@pytest.fixture
def parts(make_source, split):
    sets = [
        DataSet(make_source("ab", {"x": [1, 2, 0], "y": [1]}, name="one")),
        DataSet(make_source("bc", train={"x": [1, 0]}, test={"z": [2]}, name="two", patients=True)),
    ]
    return partial_labels(sets, **split)


def test_sizes(stream, parts):
    assert list_sizes(stream) == {"train": [4, 2], "validation": [4, 2], "test": [4, 5]}
    assert list_sizes(parts) == {"train": [2, 1], "validation": None, "test": [2, 3]}


def test_left_out_rows(stream):
    assert left_out_rows(stream) == [4]


def test_summary(stream):
    whole = summarize(stream)
    assert json.loads(json.dumps(whole)) == whole
    assert whole["protocol"] == "class-incremental 2-1 overlap, order given"
    assert whole["classes"] == 3 and whole["left_out"] == ["d"]
    first, second = whole["tasks"]
    assert first["name"] == "1-2" and first["new"] == ["a", "b"] and first["index"] == 0
    assert first["images"] == {"train": {"train": 4}, "validation": {"validation": 4}, "test": {"test": 4}}
    # s1 0 1; s2 2 and background (3 is of the future); s4 1 and background; s6 1 and background
    assert first["shown_by_images"]["train"]["train"] == {"background": 4, "a": 3, "b": 1}
    assert second["shown_by_images"]["train"]["train"] == {"background": 2, "c": 2}
    assert second["shown_by_images"]["test"]["test"] == {"background": 4, "a": 3, "b": 1, "c": 2}
    assert first["without_images"] == []


def test_a_class_that_no_image_of_its_task_shows_is_refused(make_source, split):
    source = make_source("abcd", {"x": [1], "y": [4, 3]})
    with pytest.raises(DataError, match="no training image of task 'classes 1 to 2' shows class 'b'") as told:
        class_incremental(source, base=2, step=2, **split)
    assert "stream.order" in told.value.hint
    assert len(class_incremental(source, base=1, step=2, order=[1, 3, 4], **split)) == 2
    assert len(class_incremental(source, base=2, step=2, sealed=1, **split)) == 2  # its task is over


def test_summary_of_data_sets(parts):
    first, second = summarize(parts)["tasks"]
    assert first["images"]["validation"] == {"validation": 2}
    assert second["images"] == {"train": {"train": 1}, "validation": None, "test": {"one": 2, "two": 1}}
    assert second["shown_by_images"]["train"] == {"train": {"background": 1, "b": 1}}
    assert second["shown_by_images"]["test"] == {"one": {"background": 1, "a": 2, "b": 1}, "two": {"c": 1}}
    assert second["annotated"] == ["b", "c"] and second["new"] == ["c"] and second["without_images"] == ["c"]


def test_summary_of_a_merged_stream_reads_masks_once(stream, reads):
    reads.clear()
    whole = summarize(merged(stream))
    assert whole["tasks"][0]["images"]["train"] == {"train": 5}
    assert reads == []  # train, val and test are one mask set, read when the stream was made


def test_description_comes_back(stream, tmp_path):
    described = describe(stream, "fake", False)
    write_stream(tmp_path / "stream.json", described)
    assert read_stream(tmp_path / "stream.json") == described
    again = restore(read_stream(tmp_path / "stream.json"))
    lists = {"images": 0, "digest": "", "content": ""}  # a stream without data has no training lists
    without = tuple(task.model_copy(update=lists) for task in described.tasks)
    assert describe(again, "fake", False) == described.model_copy(update={"tasks": without})
    for ours, theirs in zip(stream.tasks, again.tasks, strict=True):
        assert (ours.new, ours.old, ours.annotated, ours.name, ours.recurs) == (
            theirs.new, theirs.old, theirs.annotated, theirs.name, theirs.recurs,
        )  # fmt: skip
    assert again.space == stream.space and again.groups == stream.groups and again.protocol == stream.protocol
    with pytest.raises(SealedDataError, match="has no data attached"):
        again.tasks[0].tests()
    with pytest.raises(UsageError, match="has no data attached"):
        list_sizes(again)


def test_description_holds_what_the_run_folder_needs(parts):
    content = describe(parts, "two hospitals", True).model_dump(mode="json")
    first = ["protocol", "dataset", "kind", "background", "patients", "measured", "tolerance"]
    assert list(content) == [*first, "classes", "tasks", "groups"]
    assert content["patients"] is True
    assert {len(content["tasks"][1].pop(key)) for key in ("digest", "content", "tests")} == {24}
    assert content["tasks"][1] == {
        "index": 1, "name": "two", "new": [3], "old": [1, 2], "annotated": [2, 3], "recurs": False,
        "preparation": Preparation().model_dump(mode="json"), "data": {}, "images": 1, "pool": "",
    }  # fmt: skip
    assert set(content["classes"][0]) == {"id", "name", "kind", "color"}


def test_description_of_a_merged_stream_keeps_the_groups(stream):
    again = restore(describe(merged(stream), "fake", False))
    assert len(again) == 1 and again.groups == ((1, 2), (3,))
    assert merged(restore(describe(stream, "fake", False))).tasks[0].data is None


def test_a_run_goes_on_with_its_own_colours(parts):
    mine = describe(parts, "two hospitals", True)
    painted = [replace(c, color=(1, 2, 3)) for c in mine.classes]
    later = mine.model_copy(update={"classes": tuple(painted)})
    assert mine.continued_by(later, 1).classes == mine.classes


def damage(content):
    yield {}
    for key in ("classes", "tasks", "groups", "protocol", "background"):
        yield {k: v for k, v in content.items() if k != key}
    yield content | {"classes": content["classes"][:1]}
    yield content | {"classes": content["classes"] * 2}
    yield content | {"tasks": []}
    yield content | {"tasks": [content["tasks"][0]] * 2}
    yield content | {"tasks": content["tasks"][::-1]}
    yield content | {"tasks": "none"}
    yield content | {"groups": [["x"]]}
    yield content | {"tasks": [content["tasks"][0], content["tasks"][1] | {"old": [1]}]}
    yield content | {"classes": [content["classes"][0] | {"color": [1]}]}


def test_damaged_description(stream):
    content = describe(stream, "fake", False).model_dump(mode="json")
    assert restore(parse_stream(content)).space == stream.space
    count = 0
    for broken in damage(content):
        count += 1
        with pytest.raises(DataError, match=r"stream\.json does not describe a stream: "):
            parse_stream(broken)
    assert count == 15
