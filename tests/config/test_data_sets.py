"""Data sets of a recipe: their order, what they annotate, and how the cases of each are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perdure.config import preparations as prepared
from perdure.config.build import build_stream
from perdure.config.data_sets import data_sets, in_order, open_sources
from perdure.config.load import parse_recipe
from perdure.config.preparations import preparations
from perdure.config.recipe import DataSetsSection, Recipe
from perdure.data.case import Case
from perdure.data.preparation import Photo2D, Preparation
from perdure.data.source import Source
from perdure.data.volumes.preprocessing import Volume3D
from perdure.errors import DataError, PerdureError, UsageError
from perdure.labels import label_space
from perdure.streams.description import describe
from perdure.streams.task import Stream

KINDS = ("cardiac", "fundus", "prostate")


def recipe(tasks: list[dict[str, Any]] | None = None, seed: int = 1, **more: Any) -> Recipe:
    """Three sets of slices, or the given tasks; ``more`` are entries of ``stream`` and the sections ``volumes``."""
    small = {"name": "phantoms", "size": 32, "train": 2, "test": 1}
    given = tasks or [{"name": kind, "data": {**small, "kind": kind}} for kind in KINDS]
    volumes = more.pop("volumes", {})
    content = {
        "name": "sets",
        "seed": seed,
        "stream": {"kind": "data_sets", "tasks": given, **more},
        "augment": {"crop": 32, "mean": [0.5], "std": [0.25]},
        "evaluate": {"size": None},
        "method": "finetune",
        "volumes": volumes,
    }
    return parse_recipe(content, "a test")


def built(given: Recipe) -> Stream:
    ordered = in_order(given)
    assert isinstance(ordered.stream, DataSetsSection)
    return data_sets(ordered, ordered.stream, open_sources(ordered), None)[0]


def names(given: Recipe) -> list[str]:
    plan = in_order(given).stream
    assert isinstance(plan, DataSetsSection)
    return [task.name for task in plan.tasks]


ORDERS: list[tuple[Any, list[str]]] = [
    ("natural", ["cardiac", "fundus", "prostate"]),
    ("reversed", ["prostate", "fundus", "cardiac"]),
    (["fundus", "prostate", "cardiac"], ["fundus", "prostate", "cardiac"]),
]


@pytest.mark.parametrize(("order", "expected"), ORDERS, ids=str)
def test_the_order_of_a_recipe_is_that_of_its_tasks_and_of_their_classes(order: Any, expected: list[str]) -> None:
    stream = built(recipe(order=order))
    assert [task.name for task in stream.tasks] == expected
    learned = [stream.space.name(c) for task in stream.tasks for c in task.new]
    by_task = {name: open_sources(recipe())[place].space for place, name in enumerate(KINDS)}
    assert learned == [by_task[name].name(c) for name in expected for c in by_task[name].ids]
    assert [c for task in stream.tasks for c in task.new] == list(range(1, len(learned) + 1))
    # written as it is learned, so that a set that is added comes at its end
    again = in_order(in_order(recipe(order=order)))
    assert isinstance(again.stream, DataSetsSection)
    assert again.stream.order == "natural" and [task.name for task in again.stream.tasks] == expected


def test_a_shuffled_order_depends_on_the_seed_alone() -> None:
    found = {seed: names(recipe(seed=seed, order="shuffled")) for seed in range(12)}
    assert all(sorted(order) == sorted(KINDS) for order in found.values())
    assert len({tuple(order) for order in found.values()}) > 1
    assert all(names(recipe(seed=seed, order="shuffled")) == order for seed, order in found.items())


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ({"order": ["cardiac", "fundus"]}, "does not name each task once"),
        ({"order": ["cardiac", "fundus", "fundus"]}, "does not name each task once"),
        ({"order": ["cardiac", "fundus", "lung"]}, "tasks: cardiac, fundus, prostate"),
    ],
)
def test_an_order_that_is_none(stream: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as told:
        in_order(recipe(**stream))
    assert words in f"{told.value.what} {told.value.hint}"


def test_union_by_offset_gives_every_set_classes_of_its_own_in_any_order() -> None:
    twice = [
        {"name": n, "data": {"name": "phantoms", "kind": "fundus", "size": 32, "train": 1, "test": 1}} for n in "ab"
    ]
    for order, first in (("natural", "a"), ("reversed", "b")):
        stream = built(recipe(twice, union="offset", order=order))
        sizes = [len(task.new) for task in stream.tasks]
        assert sizes[0] == sizes[1] > 0 and stream.tasks[0].name == first
        assert stream.tasks[1].new == tuple(range(sizes[0] + 1, 2 * sizes[0] + 1))
        assert stream.space.name(1).startswith(f"{first}: ")
    one = built(recipe(twice))
    assert one.tasks[1].new == () and one.tasks[1].annotated == set(one.tasks[0].new)


def test_what_a_set_can_tell_follows_elsewhere_and_annotated() -> None:
    """``annotated``: of its images it is known that they show no class of another set."""
    stream = built(recipe())
    told = {name: dataset.annotated for name, dataset in stream.tasks[-1].tests().items()}
    assert told == {task.name: task.annotated for task in stream.tasks}
    absent = built(recipe(elsewhere="absent"))
    assert {d.annotated for d in absent.tasks[-1].tests().values()} == {None}

    small = {"name": "phantoms", "size": 32, "train": 1, "test": 1}
    tasks = [{"name": kind, "data": {**small, "kind": kind}} for kind in ("cardiac", "fundus")]
    first = open_sources(recipe(tasks))[0].space
    tasks[1]["annotated"] = [first.name(1)]
    stream = built(recipe(tasks))
    assert stream.tasks[1].annotated == set(stream.tasks[1].new)
    assert stream.tasks[1].tests()["fundus"].annotated == {1, *stream.tasks[1].new}
    tasks[1]["annotated"] = ["nothing of the kind"]
    with pytest.raises(UsageError, match="nothing of the kind"):
        built(recipe(tasks))


def test_choice_and_names_of_classes_come_from_the_recipe() -> None:
    small = {"name": "phantoms", "size": 32, "train": 1, "test": 1, "kind": "torso"}
    first = {"name": "first", "data": small, "classes": ["kidneys", "liver"], "rename": {"kidneys": "Niere"}}
    source = open_sources(recipe([first]))[0]
    assert [source.space.name(c) for c in source.space.ids] == ["liver", "spleen", "kidneys"]
    view = {"view": "volumes", "plan": "given", "spacing": [12, 10, 10], "patch": [8, 8, 8], "normalisation": "none"}
    given = recipe([first], volumes=view)
    stream, _ = build_stream(given, open_sources(given))
    assert [stream.space.name(c) for c in stream.tasks[0].new] == ["Niere", "liver"]
    table = stream.tasks[0].tests()["first"].table
    assert [int(table[c]) for c in source.space.ids] == [2, 0, 1]


@pytest.mark.parametrize(
    ("tasks", "error", "words"),
    [
        ([], UsageError, "the recipe names no data set"),
        ([{"name": "eye", "data": {"name": "phantoms", "kind": "lung"}}], PerdureError, "task 1 ('eye'): "),
        ([{"data": {"name": "folders", "root": "gone"}}], PerdureError, "task 1 ('folders'): "),
        ([{"name": "one", "data": "phantoms"}, {"data": {"name": "nnunet"}}], PerdureError, "task 2 ('nnunet'): "),
    ],
    ids=["none", "an option", "no folder", "a folder that is not named"],
)
def test_a_set_that_cannot_be_opened_is_named(
    tasks: list[dict[str, Any]], error: type[PerdureError], words: str
) -> None:
    given = recipe(tasks or None)
    if not tasks:
        assert isinstance(given.stream, DataSetsSection)
        given = given.model_copy(update={"stream": given.stream.model_copy(update={"tasks": ()})})
    with pytest.raises(error) as told:
        open_sources(given)
    assert told.value.what.startswith(words)


class Made(Source):
    """A set of volumes without any: only its name, channels and what they show count here."""

    kind, patients, other_label, dims = "segmentation", False, 0, 3
    space = label_space(["gland"])

    def __init__(self, name: str, modality: tuple[str, ...] = ("MR",)) -> None:
        self.name, self.modality = name, modality

    def names(self, split: str) -> list[str]:
        return ["a"]

    def image(self, split: str, name: str) -> Any:
        return np.zeros((len(self.modality), 4, 4, 4), np.float32)

    def mask(self, split: str, name: str) -> Any:
        return np.ones((4, 4, 4), np.int16)

    def fingerprint(self, split: str) -> str:
        return f"{self.name} {split}"


def planned(spacing: float, *, modality: str = "MR", channels: int = 1) -> Volume3D:
    return Volume3D(
        channels=channels,
        patch=(8, 8, 8),
        spacing=(spacing, 1.0, 1.0),
        schemes=("ZScoreNormalization",) * channels,
        masked=(False,) * channels,
        intensities=(None,) * channels,
        modality=(modality,) * channels,
    )


OWN: dict[str, Preparation] = {
    "near": planned(3.0),
    "like": planned(4.0),
    "far": planned(7.0),
    "sound": planned(3.0, modality="US"),
    "two": planned(3.0, channels=2),
    "photo": Photo2D(channels=1, patch=(32, 32), mean=(0.5,), std=(0.25,)),
}
FITS: list[tuple[str, list[str], list[str], list[str]]] = [
    # where plans come from, the sets, whose plan each is shown by, and words of the notes
    ("first", ["near", "like"], ["near", "near"], []),
    ("first", ["like", "near"], ["like", "like"], []),
    ("first", ["near", "far"], ["near", "near"], ["task 2: far has voxels of 7 × 1 × 1 mm"]),
    ("first", ["near", "sound"], ["near", "near"], ["task 2: sound holds US, and the first task held MR"]),
    ("first", ["near", "far", "sound"], ["near"] * 3, ["task 2: far has voxels", "task 3: sound holds US"]),
    ("per_task", ["near", "far", "sound"], ["near", "far", "sound"], []),
    ("per_task", ["far", "near"], ["far", "near"], []),
]


def given_plans(monkeypatch: pytest.MonkeyPatch, plan: str, sets: list[str]) -> tuple[Recipe, list[Source]]:
    monkeypatch.setattr(prepared, "_planned", lambda _, source: OWN[source.name])
    tasks = [{"name": f"task {place}", "data": "phantoms"} for place in range(1, len(sets) + 1)]
    return recipe(tasks, volumes={"plan": plan}), [Made(name) for name in sets]


@pytest.mark.parametrize(("plan", "sets", "shown", "notes"), FITS, ids=lambda value: str(value))
def test_the_first_plan_or_one_per_task(
    monkeypatch: pytest.MonkeyPatch, plan: str, sets: list[str], shown: list[str], notes: list[str]
) -> None:
    given, sources = given_plans(monkeypatch, plan, sets)
    found, told = preparations(given, sources, None)
    assert found == [OWN[name] for name in shown]
    assert len(told) == len(notes) and all(line.startswith(words) for line, words in zip(told, notes, strict=True))


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["near", "two"], "two has 2 channels, and the network takes 1"),
        (["photo", "near"], "near has 3 spatial axes (volume3d), the first data set 2 (photo2d)"),
    ],
)
def test_other_channels_and_axes_are_refused(monkeypatch: pytest.MonkeyPatch, sets: list[str], words: str) -> None:
    given, sources = given_plans(monkeypatch, "first", sets)
    if "photo" not in sets:
        pytest.importorskip("nnunetv2")
    with pytest.raises(DataError) as told:
        preparations(given, sources, None)
    assert words in told.value.what and told.value.hint


def test_test_cases_are_shown_by_the_plan_of_their_own_task(monkeypatch: pytest.MonkeyPatch) -> None:
    given, sources = given_plans(monkeypatch, "per_task", ["near", "far", "sound"])
    assert isinstance(given.stream, DataSetsSection)
    stream, _ = data_sets(given, given.stream, sources, None)
    tests = stream.tasks[-1].tests()
    assert [one.preparation for one in tests.values()] == [OWN[name] for name in ("near", "far", "sound")]
    assert [task.preparation for task in stream.tasks] == [OWN[name] for name in ("near", "far", "sound")]
    # and pages do not name the newest plan as if it were that of all
    assert describe(stream, "three", False).evaluation[1] == ", shown to the network by a plan of each task"


def test_tasks_that_a_run_knows_are_shown_as_it_knows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An added set is compared with the first task as the run has it, and nothing is planned for the known ones."""
    given, sources = given_plans(monkeypatch, "first", ["near", "like"])
    assert isinstance(given.stream, DataSetsSection)
    stream, _ = data_sets(given, given.stream, sources, None)
    known = describe(stream, "near, like", False, "segmentation", [{}, {}])
    more, later = given_plans(monkeypatch, "first", ["near", "like", "far"])
    asked: list[str] = []

    def plan(_: Recipe, source: Source) -> Preparation:
        asked.append(source.name)
        return OWN[source.name]

    monkeypatch.setattr(prepared, "_planned", plan)
    found, told = preparations(more, later, known)
    assert found == [OWN["near"]] * 3 and asked == ["far"]
    assert len(told) == 1 and told[0].startswith("task 3: far has voxels")


def test_cases_that_state_their_own_classes_tell_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``annotated.json`` says of one case, in the ids of the stream, and never more than its set annotates."""
    given = recipe(
        [{"name": "one", "data": {"name": "phantoms", "kind": "cardiac", "size": 32, "train": 2, "test": 1}}]
    )
    source = open_sources(given)[0]
    read = type(source).read
    own = {source.names("train")[0]: frozenset({2})}

    def partly(self: Source, split: Any, name: str) -> Case:
        return replace(read(self, split, name), annotated=own.get(name))

    monkeypatch.setattr(type(source), "read", partly)
    names = [source.space.name(c) for c in source.space.ids]
    assert isinstance(given.stream, DataSetsSection)
    task = given.stream.tasks[0].model_copy(update={"classes": (names[1], names[0])})
    chosen = given.model_copy(update={"stream": given.stream.model_copy(update={"tasks": (task,)})})
    assert isinstance(chosen.stream, DataSetsSection)
    stream, _ = data_sets(chosen, chosen.stream, [source], None)
    with stream.opened(stream.tasks[0]) as opened:
        cases = [opened.train().read(place) for place in range(2)]  # type: ignore[attr-defined]
    assert [case.annotated for case in cases] == [{1}, {1, 2}]
