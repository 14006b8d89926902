"""What a task did to earlier classes, against the definitions in plain numpy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from perdure.kept.ledger import task_folder
from perdure.labels import IGNORE
from perdure.metrics.changes import BEFORE, OUTPUTS, Changes, ClassChange, changes, read_changes
from perdure.metrics.confusion import ConfusionMatrix, confusion, write_counts

OLD, SEEN = (4, 2), (4, 2, 7)
"""Classes in learning order, not in order of their ids; 7 is what the task taught."""


def dice(first: np.ndarray, second: np.ndarray, class_id: int) -> float | None:
    """Dice of one class in percent, of all voxels together; None where the first does not show it."""
    a, b = first == class_id, second == class_id
    return 100 * 2 * float((a & b).sum()) / float(a.sum() + b.sum()) if a.any() else None


def counted(truth: np.ndarray, guess: np.ndarray, ids: tuple[int, ...]) -> ConfusionMatrix:
    found = ConfusionMatrix.empty(ids)
    found.add(confusion(torch.from_numpy(truth)[None], torch.from_numpy(guess)[None], (0, *ids)))
    return found


class Drawn:
    """Labels and outputs of a model before and after a task, on test cases of two earlier sets and of the new one."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)

        def labels(*ids: int) -> np.ndarray:
            return draw.choice(np.array((0, *ids)), (5, 6, 7)).astype(np.int64)

        self.truth = {"north": labels(4, IGNORE), "south": labels(2), "new": labels(2, 7)}
        self.old = {name: labels(*OLD) for name in self.truth}
        self.new = {name: labels(*SEEN) for name in self.truth}

    def found(self, before: tuple[str, ...], after: tuple[str, ...]) -> Changes:
        return changes(
            OLD,
            counted(self.old["new"], self.new["new"], SEEN),
            counted(self.truth["new"], self.old["new"], OLD),
            {name: counted(self.truth[name], self.old[name], OLD) for name in before},
            {name: counted(self.truth[name], self.new[name], SEEN) for name in after},
            "new",
        )

    def pooled(self, outputs: dict[str, np.ndarray], sets: tuple[str, ...], class_id: int) -> float | None:
        """Dice over the voxels of some sets that are labelled; classes that are measured only."""
        truth = np.concatenate([self.truth[name].ravel() for name in sets])
        guess = np.concatenate([outputs[name].ravel() for name in sets])
        return dice(truth[truth != IGNORE], guess[truth != IGNORE], class_id)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("before", "after", "shared"),
    [
        (("north", "south"), ("north", "south", "new"), ("north", "south")),
        (("north", "south"), ("south", "new"), ("south",)),
        (("north",), ("new",), ()),
        ((), ("new",), ()),
    ],
    ids=["all at hand", "one at hand", "none at hand", "none measured before"],
)
def test_changes_are_the_definitions(
    seed: int, before: tuple[str, ...], after: tuple[str, ...], shared: tuple[str, ...]
) -> None:
    drawn = Drawn(seed)
    found = drawn.found(before, after)
    assert [c.class_id for c in found.classes] == list(OLD)
    for c in found.classes:
        expected = [drawn.pooled(outputs, shared, c.class_id) if shared else None for outputs in (drawn.old, drawn.new)]
        assert [c.before, c.after] == pytest.approx(expected)
        assert c.agreement == pytest.approx(dice(drawn.old["new"], drawn.new["new"], c.class_id))
        if shared:
            assert c.before is None or c.fall == pytest.approx(expected[0] - expected[1])
        if c.before is None:
            truth, known = drawn.truth["new"], drawn.truth["new"] != 7  # the old model knew no 7
            was, now = (
                dice(truth[known], drawn.old["new"][known], c.class_id),
                dice(truth[known], drawn.new["new"][known], c.class_id),
            )
            assert c.agreement is not None
            labelled = was is not None and now is not None
            assert c.fall == pytest.approx(was - now if labelled else 100 - c.agreement)
            assert c.fell_in == ("Dice" if labelled else "agreement with its old output")
    old, new = drawn.old["new"], drawn.new["new"]
    assert found.changed == pytest.approx(100 * np.mean((old != new) & (new != 7)))


def test_the_model_as_it_was_is_measured_only_where_the_new_cases_are_labelled() -> None:
    drawn = Drawn(0)
    first, second = drawn.found((), ("new",)).classes
    # the labels of the new set that the old model did not know are not counted
    measured = drawn.truth["new"] != 7
    assert second.as_it_was == pytest.approx(dice(drawn.truth["new"][measured], drawn.old["new"][measured], 2))
    assert (first.class_id, first.as_it_was) == (4, None)


def test_a_new_class_in_the_new_cases_is_no_fall_of_an_earlier_one() -> None:
    """The same output before and after: voxels of the new class count in neither Dice."""
    drawn = Drawn(0)
    drawn.new = drawn.old
    second = drawn.found((), ("new",)).classes[1]
    assert second.as_it_was == second.as_it_is and second.fall == 0


def test_without_voxels_and_without_a_class_there_is_no_figure() -> None:
    nothing = changes(OLD, ConfusionMatrix.empty(SEEN), ConfusionMatrix.empty(OLD), {}, {})
    assert nothing == Changes(tuple(ClassChange(c, None, None, None, None, None) for c in OLD), None)
    assert [c.fall for c in nothing.classes] == [None, None]


def test_cases_that_are_back_are_measured_after_the_task_alone() -> None:
    drawn = Drawn(1)
    first, second = drawn.found(("south",), ("north", "south", "new")).classes
    assert first.before is None and first.after == pytest.approx(drawn.pooled(drawn.new, ("north",), 4))
    assert second.before is not None and second.after == pytest.approx(drawn.pooled(drawn.new, ("south",), 2))


class Streams(NamedTuple):
    """What :func:`read_changes` asks of a stream."""

    tasks: list[Any]


def test_a_set_that_returns_is_compared_with_its_last_measurement(tmp_path: Path) -> None:
    """North was measured after north and after south, not after east, and is at hand again after the new set."""
    drawn = Drawn(2)
    names = ("north", "south", "east", "new")
    stream = Streams([SimpleNamespace(index=k, name=name, old=OLD) for k, name in enumerate(names)])
    folders = [task_folder(tmp_path, k, name) for k, name in enumerate(names)]

    def north(outputs: np.ndarray, ids: tuple[int, ...] = OLD, truth: np.ndarray | None = None) -> ConfusionMatrix:
        return counted(drawn.truth["north"] if truth is None else truth, outputs, ids)

    bad = np.zeros_like(drawn.old["north"])
    new, south = (counted(drawn.truth[n], drawn.new[n], SEEN) for n in ("new", "south"))
    measured: list[dict[str, ConfusionMatrix]] = [
        {"north": north(bad)},
        {"north": north(drawn.old["north"]), "south": south},
        {"east": new},
        {"north": north(drawn.new["north"], SEEN), "new": new},
    ]
    for folder, sets in zip(folders, measured, strict=True):
        folder.mkdir(parents=True)
        write_counts(folder / "counts.json", sets)
    outputs, was = counted(drawn.old["new"], drawn.new["new"], SEEN), counted(drawn.truth["new"], drawn.old["new"], OLD)
    write_counts(folders[3] / "changes.json", {OUTPUTS: outputs, BEFORE: was})

    def first() -> ClassChange:
        found = read_changes(tmp_path, stream, 3)  # type: ignore[arg-type]
        assert found is not None
        return found.classes[0]

    before, after = (drawn.pooled(outputs, ("north",), 4) for outputs in (drawn.old, drawn.new))
    assert before is not None and after is not None
    found = first()
    assert (found.class_id, found.since, found.fell_in) == (4, ("south",), "Dice since south")
    assert [found.before, found.after, found.fall] == pytest.approx([before, after, before - after])
    # of other cases the last record tells nothing: that before it is looked for
    other = drawn.truth["north"].copy()
    other[other == 4] = 2
    write_counts(folders[1] / "counts.json", {"north": north(drawn.old["north"], truth=other)})
    assert (first().since, first().before) == (("north",), 0)
    more = north(bad)
    more.cases += 1
    write_counts(folders[0] / "counts.json", {"north": more})
    assert (first().since, first().before, first().after) == ((), None, pytest.approx(after))


def test_a_model_that_stayed_as_it_was_changed_nothing() -> None:
    drawn = Drawn(3)
    drawn.new = drawn.old
    found = drawn.found(("north", "south"), ("north", "south", "new"))
    assert found.changed == 0
    assert [c.fall for c in found.classes] == [0, 0] and [c.agreement for c in found.classes] == [100, 100]
