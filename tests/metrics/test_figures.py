"""Every figure and variant against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from perdure.data.source import Kind
from perdure.errors import DataError, PerdureError, UsageError
from perdure.metrics.cases import CaseTable
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.continual import KeptCounts
from perdure.metrics.definitions import DEFINITIONS, Definition, Scope, variants
from perdure.metrics.figures import case_values, evaluate, forgetting_by_group, group_matrix, headline
from perdure.metrics.measured import UNDEFINED, at_zero, class_values, run_results
from perdure.metrics.numbers import TaskNumbers
from perdure.streams.description import DescribedStream, parse_stream

REST = {"recurs": False, "preparation": {"kind": "as_is"}}


def stream(groups: Sequence[Sequence[int]], merged: bool = False, background: str | None = "ground") -> DescribedStream:
    classes = [{"id": c, "name": f"c{c}", "kind": "thing", "color": [c, c, c]} for g in groups for c in g]
    tasks: list[dict[str, Any]] = []
    old: list[int] = []
    for index, new in enumerate([[c for g in groups for c in g]] if merged else groups):
        tasks.append({"index": index, "name": f"t{index}", "new": list(new), "old": old,
                      "annotated": list(new), **REST})  # fmt: skip
        old = old + list(new)
    return parse_stream({"protocol": "p", "dataset": "d", "background": background, "patients": False,
                         "classes": classes, "tasks": tasks, "groups": [list(g) for g in groups]})  # fmt: skip


def hits(percent: Mapping[int, int]) -> dict[str, ConfusionMatrix]:
    """Counts in which each class has 100 pixels and the given number of them right, the rest called label 0."""
    counts = ConfusionMatrix.empty(percent)
    for k, right in enumerate(percent.values(), start=1):
        counts.matrix[k, k], counts.matrix[k, 0] = right, 100 - right
    return {"all": counts}


# IoU after task 1: label 0 40/70, class 1 20/40, class 2 is absent but predicted, class 3 10/15.
TWO = run_results(
    stream([[1, 2], [3]]),
    {
        0: {"all": ConfusionMatrix((0, 1, 2), np.array([[50, 5, 0], [10, 30, 0], [0, 5, 0]]))},
        1: {
            "all": ConfusionMatrix((0, 1, 2, 3), np.array([[40, 0, 5, 5], [20, 20, 0, 0], [0, 0, 0, 0], [0, 0, 0, 10]]))
        },
    },
)
# R = [80 . .], [90 60 .], [50 70 40]
THREE_STREAM = stream([[1], [2], [3]])
THREE = run_results(
    THREE_STREAM, {0: hits({1: 80}), 1: hits({1: 90, 2: 60}), 2: hits({1: 50, 2: 70, 3: 40})}
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "n"),
    [
        ("miou.all[bg=in,absent=skip]", (400 / 7 + 50 + 200 / 3) / 3, 3),
        ("miou.all[bg=in,absent=zero]", (400 / 7 + 50 + 200 / 3) / 4, 4),
        ("miou.all[bg=out,absent=skip]", (50 + 200 / 3) / 2, 2),
        ("miou.all[bg=out,absent=zero]", (50 + 200 / 3) / 3, 3),
        ("miou.old[bg=in,absent=skip]", (400 / 7 + 50) / 2, 2),
        ("miou.old[bg=in,absent=zero]", (400 / 7 + 50) / 3, 3),
        ("miou.old[bg=out,absent=skip]", 50, 1),
        ("miou.old[bg=out,absent=zero]", 25, 2),
        ("miou.new[absent=skip]", 200 / 3, 1),
        ("miou.new[absent=zero]", 200 / 3, 1),
        ("hiou[bg=out,absent=skip]", 2 * 50 * (200 / 3) / (50 + 200 / 3), 2),
        ("hiou[bg=out,absent=zero]", 2 * 25 * (200 / 3) / (25 + 200 / 3), 3),
        ("dice.all[bg=in,absent=skip]", (8000 / 110 + 4000 / 60 + 80) / 3, 3),
        ("dice.all[bg=out,absent=zero]", (4000 / 60 + 80) / 3, 3),
        ("accuracy.all[bg=in]", 70, 100),
        ("accuracy.all[bg=out]", 60, 50),
        ("accuracy.mean[bg=in,absent=skip]", (80 + 50 + 100) / 3, 3),
        ("accuracy.mean[bg=in,absent=zero]", (80 + 50 + 100) / 4, 4),
        ("accuracy.mean[bg=out,absent=skip]", 75, 2),
        ("accuracy.mean[bg=out,absent=zero]", 50, 3),
        ("miou.average", ((5000 / 65 + 60 + 0) / 3 + (400 / 7 + 50 + 200 / 3) / 3) / 2, 2),
        ("miou.average[bg=out]", (30 + (50 + 200 / 3) / 2) / 2, 2),
        ("dice.average[bg=out]", ((75 + 0) / 2 + (4000 / 60 + 80) / 2) / 2, 2),
        ("forgetting[max-last]", 30 - 50, 1),
        ("forgetting[best-last]", 0, 1),
        ("forgetting[max-last,of=dice]", 37.5 - 4000 / 60, 1),
        ("forgetting[max-last,of=accuracy]", 100 * 30 / 45 - 50, 1),
        ("forgetting[max-last,of=balanced]", 75 / 2 - 50, 1),
    ],
)
def test_two_tasks_with_an_absent_class(name: str, value: float, n: int) -> None:
    got = evaluate(name, TWO, 1)
    assert got.value == pytest.approx(value, abs=1e-9)
    assert got.n == n


@pytest.mark.parametrize(
    ("name", "after", "value", "n"),
    [
        ("forgetting[max-last]", 2, (40 - 10) / 2, 2),
        ("forgetting[best-last]", 2, (40 + 0) / 2, 2),
        ("forgetting[first-last]", 2, (30 - 10) / 2, 2),
        ("forgetting[max-last]", 1, -10, 1),
        ("forgetting[best-last]", 1, 0, 1),
        ("bwt[last-diagonal]", 2, (-30 + 10) / 2, 2),
        ("bwt[all-pairs]", 2, (10 - 30 + 10) / 3, 3),
        ("bwt[last-diagonal]", 1, 10, 1),
        ("miou.average[bg=out]", 2, (80 + 75 + 160 / 3) / 3, 3),
        ("miou.old[bg=out]", 2, 50, 1),
        ("miou.new", 2, 55, 2),
        ("miou.new", 1, 60, 1),
    ],
)
def test_three_tasks(name: str, after: int, value: float, n: int) -> None:
    got = evaluate(name, THREE, after)
    assert got.value == pytest.approx(value, abs=1e-9)
    assert got.n == n


def test_at_the_first_task_only_all_exists() -> None:
    for name in ("miou.old", "miou.new", "hiou", "forgetting", "bwt", "intransigence"):
        assert evaluate(name, THREE, 0) == UNDEFINED
    assert evaluate("miou.all[bg=out]", THREE, 0).value == pytest.approx(80)


SCOPES: tuple[Scope, ...] = ("task", "stream", "class")


@pytest.mark.parametrize("scope", SCOPES)
def test_a_figure_without_computation_is_an_error_and_not_another_figures_value(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = Definition("made.up", "made up", scope, "Nothing.", "-")
    monkeypatch.setitem(DEFINITIONS, "made.up", made_up)
    with pytest.raises(PerdureError, match=r"'made\.up' is defined but not computed"):
        class_values("made.up", TWO.counts[1]) if scope == "class" else evaluate("made.up", TWO, 1)


def one_case(counts: ConfusionMatrix) -> CaseTable:
    """All pixels as two equal cases with distances."""
    right, both = np.diagonal(counts.matrix), counts.truth + counts.matrix.sum(0)
    dice = np.where(both > 0, 200 * right / np.maximum(both, 1), np.nan)
    values = np.stack([dice, dice, dice, dice], 1)[None].repeat(2, 0)
    return CaseTable(("all", "all"), counts.labels, values, (counts.truth > 0)[None].repeat(2, 0))


def test_every_defined_figure_is_computed() -> None:
    joint = run_results(stream([[1], [2], [3]], merged=True), {0: hits({1: 85, 2: 75, 3: 45})})
    # figures of tasks that annotate what earlier ones do, or all the same, need such streams
    recurring = {"forgetting.appearance": [[1], [1, 2], [2, 3]], "e-fwt": [[1, 2, 3]] * 3}
    counts = {t: {"all": c} for t, c in THREE.counts.items()}
    kept = {t: KeptCounts(10, False) for t in counts}
    for kind in get_args(Kind):
        for definition in DEFINITIONS.values():
            described = stream([[1], [2], [3]], background=None).model_copy(update={"kind": kind})
            if annotated := recurring.get(definition.name):
                tasks = zip(described.tasks, annotated, strict=True)
                again = [task.model_copy(update={"annotated": tuple(ids)}) for task, ids in tasks]
                described = described.model_copy(update={"tasks": tuple(again)})
            cases = {t: one_case(c) for t, c in THREE.counts.items()}
            run = run_results(described, counts, joint, cases, kept)
            run = replace(
                run, alone=run, numbers={t: TaskNumbers(untrained=1, earlier=(2,) * t, named=3) for t in (1, 2)}
            )
            for wanted in variants(definition, kind):
                if definition.scope == "class":
                    assert class_values(definition.name, run.counts[2])[1].value is not None
                    continue
                assert evaluate(wanted, run, 2).value is not None, (str(wanted), evaluate(wanted, run, 2).why)
                if definition.scope == "case":
                    assert case_values(wanted, run, 2)[1].value is not None, str(wanted)


def test_background_that_is_ignored_makes_no_class_wrong() -> None:
    """Label 0 is called class 1 ten times and class 3 ten times; the only other error is one of class 3 called 0."""
    matrix = np.array([[30, 10, 10], [0, 40, 0], [10, 0, 10]])
    run = run_results(
        stream([[1], [3]]), {0: {"all": ConfusionMatrix((0, 1))}, 1: {"all": ConfusionMatrix((0, 1, 3), matrix)}}
    )
    assert evaluate("miou.all[bg=out]", run, 1).value == pytest.approx(100 * (40 / 50 + 10 / 30) / 2)
    assert evaluate("miou.all[bg=ignored]", run, 1).value == pytest.approx(100 * (40 / 40 + 10 / 20) / 2)
    assert evaluate("miou.old[bg=ignored]", run, 1).value == 100
    assert evaluate("miou.new[bg=ignored]", run, 1).value == 50
    assert evaluate("hiou[bg=ignored]", run, 1).value == pytest.approx(2 * 100 * 50 / 150)
    assert evaluate("hiou", run, 1).value == pytest.approx(2 * 65 * (100 / 3) / (65 + 100 / 3))
    assert run.counts[1].matrix[0, 0] == 30, "the counts themselves stay"


def test_forward_transfer_is_what_models_know_of_classes_by_name() -> None:
    run = replace(THREE, numbers={1: TaskNumbers(named=10), 2: TaskNumbers(named=4)})
    assert evaluate("fwt", run, 2) == (7, 2) and evaluate("fwt", run, 1) == (10, 1)
    assert evaluate("fwt", THREE, 2).why == "before task 't1' its classes were not predicted by their names"
    assert evaluate("fwt", run, 0) == UNDEFINED


def test_a_figure_of_the_other_kind_of_labels_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"'accuracy\.average\[bg=in\]' is not for segmentation") as caught:
        evaluate("accuracy.average", TWO, 1)
    assert caught.value.hint == "did you mean 'miou.average'?"


def test_joint_reference_gives_intransigence_and_keeps_old_and_new() -> None:
    joint = run_results(stream([[1], [2], [3]], merged=True), {0: hits({1: 85, 2: 75, 3: 45})})
    run = run_results(THREE_STREAM, {t: {"all": c} for t, c in THREE.counts.items()}, reference=joint)
    assert evaluate("intransigence", run, 2) == (pytest.approx((5 + 15 + 5) / 3), 3)
    assert evaluate("intransigence", run, 1) == (pytest.approx((5 + 15) / 2), 2)
    assert evaluate("miou.old[bg=out]", joint, 0).value == pytest.approx(85)
    assert evaluate("miou.new", joint, 0) == (pytest.approx(60), 2)
    assert evaluate("forgetting", joint, 0) == UNDEFINED


def test_values_of_classes() -> None:
    counts = TWO.counts[1]
    assert class_values("iou", counts)[0] == (pytest.approx(400 / 7), 50)
    assert class_values("iou", counts)[2] == UNDEFINED
    assert class_values("dice", counts)[3] == (pytest.approx(80), 10)
    assert class_values("recall", counts)[1] == (pytest.approx(50), 40)
    assert class_values("precision", counts)[1] == (pytest.approx(100), 20)
    assert class_values("precision", counts)[2] == (0.0, 5)


def test_harmonic_mean_of_nothing_is_zero() -> None:
    none = run_results(stream([[1], [2]]), {1: hits({1: 0, 2: 0})})
    assert evaluate("hiou[bg=out]", none, 1).value == 0.0


def test_matrix_of_groups() -> None:
    assert group_matrix(THREE) == {0: [80, None, None], 1: [90, 60, None], 2: [50, 70, 40]}
    assert forgetting_by_group(group_matrix(THREE), 2) == [40, -10]
    assert group_matrix(TWO)[1] == [pytest.approx(50), pytest.approx(200 / 3)]


def test_a_group_that_the_ground_truth_lacks_is_left_out() -> None:
    gone = hits({1: 50, 2: 60})
    gone["all"].matrix[1] = 0
    results = run_results(stream([[1], [2]]), {0: hits({1: 80}), 1: gone})
    assert evaluate("forgetting", results, 1) == UNDEFINED
    assert evaluate("miou.old[bg=out]", results, 1) == UNDEFINED
    assert evaluate("miou.old[bg=out,absent=zero]", results, 1) == (0.0, 1)


def test_figures_do_not_depend_on_the_order_in_which_classes_are_counted() -> None:
    order = [0, 3, 1, 2]
    mixed = {"all": ConfusionMatrix((0, 3, 1, 2), TWO.counts[1].matrix[np.ix_(order, order)])}
    again = run_results(TWO.stream, {0: {"all": TWO.counts[0]}, 1: mixed})
    for name in ("miou.all", "miou.old", "miou.new", "dice.all", "accuracy.mean", "forgetting"):
        assert evaluate(name, again, 1) == evaluate(name, TWO, 1)


def test_classes_at_zero_are_those_that_the_ground_truth_holds() -> None:
    counts = TWO.counts[0]  # class 1 is half right, class 2 never, class 3 is in no image
    lost = ConfusionMatrix((0, 1, 2, 3), np.array([[9, 0, 0, 4], [0, 5, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]]))
    assert at_zero(lost, (1, 2, 3), "segmentation") == at_zero(lost, (1, 2, 3), "classification") == [2]
    assert at_zero(counts, (1,), "segmentation") == []


def test_several_test_sets_are_pooled() -> None:
    halves = {"a": hits({1: 80})["all"], "b": hits({1: 20})["all"]}
    results = run_results(stream([[1], [2]]), {0: halves})
    assert evaluate("miou.all[bg=out]", results, 0) == (pytest.approx(50), 1)
    assert evaluate("accuracy.all[bg=out]", results, 0).n == 200


def test_missing_tasks_give_no_value_instead_of_another_one() -> None:
    late = run_results(THREE_STREAM, {2: hits({1: 50, 2: 70, 3: 40})})
    assert evaluate("miou.all", late, 1) == UNDEFINED
    assert evaluate("miou.average", late, 2) == UNDEFINED
    assert evaluate("forgetting", late, 2) == UNDEFINED


def test_wrong_counts_and_questions_are_plain_errors() -> None:
    with pytest.raises(DataError, match="lack class 2"):
        run_results(THREE_STREAM, {1: hits({1: 50})})
    with pytest.raises(DataError, match="counts after task 4"):
        run_results(THREE_STREAM, {3: hits({1: 50})})
    with pytest.raises(UsageError, match="one value for each class"):
        evaluate("iou", THREE, 1)


def test_headline_follows_the_background() -> None:
    assert headline(THREE_STREAM)[0] == "miou.all[bg=in,absent=skip]"
    assert headline(stream([[1], [2]], background=None))[:3] == [
        "miou.all[bg=out,absent=skip]",
        "miou.old[bg=out,absent=skip]",
        "miou.new[absent=skip]",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [[1], [2]]}, "groups do not hold"),
        ({"groups": [[1, 2], [3], []]}, "groups and tasks disagree"),
        ({"classes": []}, "not in the class list"),
        ({"tasks": None}, "does not describe a stream"),
        ({"groups": [[1], [2], ["x"]]}, "does not describe a stream"),
    ],
)
def test_streams_that_contradict_themselves(change: dict[str, Any], message: str) -> None:
    classes = [{"id": c, "name": f"c{c}", "kind": "thing", "color": [0, 0, 0]} for c in (1, 2, 3)]
    tasks = [{"index": i, "name": str(i), "new": [i + 1], "old": list(range(1, i + 1)), "annotated": [i + 1], **REST}
             for i in range(3)]  # fmt: skip
    good = {"protocol": "p", "dataset": "d", "background": None, "patients": False, "classes": classes, "tasks": tasks,
            "groups": [[1], [2], [3]]}  # fmt: skip
    assert parse_stream(good).group_of(3) == 2
    with pytest.raises(DataError, match=message):
        parse_stream(good | change)
