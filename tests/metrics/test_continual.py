"""Figures of continual segmentation against plain numpy on made-up cases, and the reason where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perdure.errors import DataError
from perdure.labels import BACKGROUND
from perdure.metrics.cases import CaseCounts, CaseTable, read_cases, write_cases
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.continual import KeptCounts
from perdure.metrics.figures import case_values, evaluate, group_matrix
from perdure.metrics.measured import UNDEFINED, RunResults, run_results
from perdure.metrics.numbers import TaskNumbers, read_numbers
from perdure.metrics.results import read_results, results_document, results_rows, write_results
from perdure.streams.description import DescribedStream, parse_stream

NAMES = ("organs", "tumours", "again")
NEW = ((1, 2), (3,), (4,))
ANNOTATED = ((1, 2), (3,), (2, 4))  # the last set shows organ 2 once more, from another scanner
CASES = (4, 3, 5)
Sets = Mapping[str, CaseCounts]


def stream(annotated: Sequence[Sequence[int]] = ANNOTATED, new: Sequence[Sequence[int]] = NEW) -> DescribedStream:
    ids = [c for group in new for c in group]
    tasks: list[dict[str, Any]] = []
    for index, name in enumerate(NAMES):
        old = [c for group in new[:index] for c in group]
        tasks.append({"index": index, "name": name, "new": list(new[index]), "old": old, "recurs": False,
                      "annotated": list(annotated[index]), "preparation": {"kind": "as_is"}})  # fmt: skip
    classes = [{"id": c, "name": f"c{c}", "kind": "organ", "color": [c, c, c]} for c in ids]
    return parse_stream({"protocol": "partial labels", "dataset": "d", "background": "ground", "patients": True,
                         "classes": classes, "tasks": tasks, "groups": [list(g) for g in new]})  # fmt: skip


def made_up(described: DescribedStream, seed: int = 0) -> list[dict[str, CaseCounts]]:
    """Pixels of each class in each case of the sets so far, after each task; a class is not in every case."""
    rng = np.random.default_rng(seed)
    shown = {(name, case, c): rng.random() < 0.8 or case == 0
             for name, n in zip(NAMES, CASES, strict=True) for case in range(n) for c in range(1, 5)}  # fmt: skip
    after = []
    for t, task in enumerate(described.tasks):
        labels = (BACKGROUND, *task.seen)
        sets = {}
        for j in range(t + 1):
            pixels = np.zeros((CASES[j], len(labels), 3), np.int64)
            for case in range(CASES[j]):
                for k, c in enumerate(labels):
                    if c in described.tasks[j].annotated:
                        truth = int(rng.integers(20, 90)) if shown[NAMES[j], case, c] else 0
                        said = int(rng.integers(10, 90)) if truth or rng.random() < 0.3 else 0
                        pixels[case, k] = truth, said, rng.integers(0, min(truth, said) + 1)
            surfaces = np.full(pixels.shape, np.nan)
            there = (pixels[..., :2].sum(2) > 0) & (np.arange(len(labels)) > 0)
            surfaces[there] = rng.uniform(1, 50, (there.sum(), 3))
            sets[NAMES[j]] = CaseCounts(labels, pixels, surfaces)
        after.append(sets)
    return after


def counts_of(sets: Sets, described: DescribedStream) -> dict[str, ConfusionMatrix]:
    """Confusion counts with these pixels: what is not right is taken for label 0, what is made up was label 0."""
    found = {}
    for name, cases in sets.items():
        truth, said, both = cases.pixels.sum(0).T
        matrix = np.diag(both)
        matrix[1:, 0], matrix[0, 1:] = (truth - both)[1:], (said - both)[1:]
        annotated = frozenset(described.tasks[NAMES.index(name)].annotated)
        found[name] = ConfusionMatrix(cases.labels, matrix, cases=len(cases.pixels), annotated=annotated)
    return found


def table_of(sets: Sets, folder: Path) -> CaseTable:
    folder.mkdir(exist_ok=True)
    for cases in sets.values():  # what only one of them holds has a diagonal and no NSD
        assert cases.surfaces is not None
        one = (cases.pixels[..., :2].min(2) == 0) & np.isfinite(cases.surfaces[..., 0])
        cases.surfaces[one] = 60, 60, 0
    write_cases(folder / "cases.csv", sets)
    return read_cases(folder / "cases.csv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def results_of(described: DescribedStream, after: Sequence[Sets], folder: Path, **more: Any) -> RunResults:
    counts = {t: counts_of(sets, described) for t, sets in enumerate(after)}
    return run_results(described, counts, cases={t: table_of(sets, folder) for t, sets in enumerate(after)}, **more)


def dice(sets: Sets, name: str, classes: Sequence[int]) -> float:
    """Mean over classes of the mean Dice over cases, straight from the pixels."""
    means = []
    for c in classes:
        cases = sets[name]
        truth, said, both = cases.pixels[:, cases.labels.index(c)].T.astype(float)
        shown = truth + said > 0
        means.append(np.mean(200 * both[shown] / (truth + said)[shown]))
    return float(np.mean(means))


def d_matrix(after: Sequence[Sets], annotated: Sequence[Sequence[int]] = ANNOTATED) -> np.ndarray:
    d = np.full((3, 3), np.nan)
    for t in range(3):
        for j in range(t + 1):
            d[t, j] = dice(after[t], NAMES[j], annotated[j])
    return d


def test_the_figures_of_the_benchmark(folder: Path) -> None:
    described = stream()
    after, alone = made_up(described), made_up(described, seed=1)
    kept = {t: KeptCounts(parameters, False) for t, parameters in enumerate((1000, 1100, 1300))}
    results = results_of(described, after, folder, kept=kept)
    d, nc = d_matrix(after), d_matrix(alone)
    with_reference = RunResults(**{**vars(results), "alone": results_of(described, alone, folder)})
    organs = [np.concatenate([*(single(after[2], name, c) for name in NAMES)]) for c in (1, 2, 3, 4)]
    expected = {
        "dice.tasks": d[2].mean(),
        "bwtr": 100 * np.mean([(d[2, j] - d[j, j]) / d[j, j] for j in (0, 1)]),
        "wcd": np.mean([values.mean() for values in organs]),
        "mpe": 100 * np.mean([100 / 1000, 200 / 1000]),
        "drr": 0,
    }
    for name, value in expected.items():
        assert evaluate(name, results, 2).value == pytest.approx(value, abs=1e-5), name
    assert evaluate("rma", results, 2) == UNDEFINED
    assert evaluate("rma", results, 2).why == (
        "needs a run of the method 'independent' on the same stream: perdure compare"
    )
    rma = 100 * np.mean([d[i, i] / nc[i, i] for i in (1, 2)])
    assert evaluate("rma", with_reference, 2) == (pytest.approx(rma, abs=1e-5), 2)
    assert evaluate("bwtr", results, 1).value == pytest.approx(100 * (d[1, 0] - d[0, 0]) / d[0, 0], abs=1e-5)
    assert all(evaluate(name, results, 0) == UNDEFINED for name in ("bwtr", "rma", "e-fwt", "mpe", "drr"))
    assert evaluate("dice.tasks", results, 0).value == pytest.approx(d[0, 0], abs=1e-5)


def single(sets: Sets, name: str, c: int) -> np.ndarray:
    """Dice of a class in each case of a set that shows it."""
    cases = sets[name]
    truth, said, both = cases.pixels[:, cases.labels.index(c)].T.astype(float)
    shown = truth + said > 0
    return 200 * both[shown] / (truth + said)[shown]


@pytest.mark.parametrize("rule", ["max-last", "best-last", "first-last"])
def test_forgetting_of_appearance_and_of_semantics_are_two_figures(rule: str, folder: Path) -> None:
    described = stream()
    after = made_up(described)
    results = results_of(described, after, folder)

    def lost(j: int, classes: Sequence[int]) -> float:
        row = [dice(after[t], NAMES[j], classes) for t in range(j, 3)]
        return {"max-last": max(row[:-1]), "best-last": max(row), "first-last": row[0]}[rule] - row[-1]

    # task 3 annotates organ 2 again, on cases of its own; organ 1 and the tumours are annotated never again
    assert evaluate(f"forgetting.appearance[{rule}]", results, 2) == (pytest.approx(lost(0, [2]), abs=1e-5), 1)
    semantics = (lost(0, [1]) + lost(1, [3])) / 2
    assert evaluate(f"forgetting.semantics[{rule}]", results, 2) == (pytest.approx(semantics, abs=1e-5), 2)
    early = evaluate(f"forgetting.appearance[{rule}]", results, 1)
    assert early == UNDEFINED and early.why == "no task annotates a structure of an earlier one"


def test_forward_generalisation_of_a_stream_of_the_same_classes(folder: Path) -> None:
    same = ((1, 2),) * 3
    described = stream(same, ((1, 2), (), ()))
    after = made_up(described)
    results = results_of(described, after, folder)
    why = "earlier models were not measured on the test cases of task 'tumours'"
    assert evaluate("e-fwt", results, 2).why == why
    seen = {1: TaskNumbers(untrained=3.0, earlier=(40.0,)), 2: TaskNumbers(untrained=4.0, earlier=(20.0, 60.0))}
    known = results_of(described, after, folder, numbers=seen)
    wanted = 2 / (3 * 2) * ((40 - 3) + (20 - 4) + (60 - 4))
    assert evaluate("e-fwt", known, 2) == (pytest.approx(wanted, abs=1e-5), 3)
    assert evaluate("e-fwt", known, 1) == (37, 1)
    empty = results_of(described, after, folder, numbers={**seen, 2: TaskNumbers(earlier=(None, 1.0))})
    assert evaluate("e-fwt", empty, 2).why == "no test case of task 'again' shows its structures"
    other = evaluate("e-fwt", results_of(stream(), made_up(stream()), folder), 2)
    assert other.why == "task 'tumours' annotates other classes than the first one"
    assert evaluate("forgetting.semantics", results, 2).why == "later tasks annotate all structures of the earlier ones"


def test_figures_over_cases(folder: Path) -> None:
    described = stream()
    after = made_up(described)
    results = results_of(described, after, folder)
    table, column = results.cases[2], {"hd95[mm]": 1, "asd[mm]": 2, "nsd[mm,2]": 3, "dice.cases": 0}
    for name, k in column.items():
        values = case_values(name, results, 2)
        of_class = {c: table.values[:, table.labels.index(c), k] for c in (1, 2, 3, 4)}
        for c, cases in of_class.items():
            own = cases[np.isfinite(cases)]
            assert values[c] == (pytest.approx(own.mean(), abs=1e-5), len(own))
            spread = case_values(f"{name[:-1]},sd]" if "[" in name else f"{name}[sd]", results, 2)[c]
            assert spread == (pytest.approx(own.std(ddof=1), abs=1e-5), len(own))
        model = np.mean([cases[np.isfinite(cases)].mean() for cases in of_class.values()])
        shown = np.isfinite(table.values[:, [c != BACKGROUND for c in table.labels], k]).any(1).sum()
        assert evaluate(name, results, 2) == (pytest.approx(model, abs=1e-5), shown)
        low, high = (evaluate(f"{name[:-1]},{end}]" if "[" in name else f"{name}[{end}]", results, 2).value
                     for end in ("ci-low", "ci-high"))  # fmt: skip
        assert low is not None and high is not None and low < model < high
    assert case_values("hd95[mm]", results, 2)[BACKGROUND] == UNDEFINED
    assert evaluate("nsd[mm,3]", results, 2).why == "the run was measured with evaluate.tolerance=2"
    plain = {name: CaseCounts(cases.labels, cases.pixels, None) for name, cases in after[2].items()}
    write_cases(folder / "cases.csv", plain)
    flat = run_results(described, {2: counts_of(after[2], described)}, cases={2: read_cases(folder / "cases.csv")})
    assert evaluate("asd[mm]", flat, 2).why == "the spacing of the images is not known in mm"
    assert evaluate("dice.cases", flat, 2).value is not None
    bare = run_results(described, {2: counts_of(after[2], described)})
    assert (
        evaluate("dice.cases", bare, 2).why
        == evaluate("wcd", bare, 2).why
        == "the cases after task 3 were not recorded"
    )


def test_a_set_that_is_gone_gives_reasons_and_no_other_numbers(folder: Path) -> None:
    described = stream()
    after = made_up(described)
    whole = results_of(described, after, folder)
    left = [after[0], after[1], {name: cases for name, cases in after[2].items() if name != "organs"}]
    results = results_of(described, left, folder)
    why = "the test cases of task 'organs' are not at hand"
    for name in ("miou.all", "miou.old", "dice.all", "hiou", "accuracy.mean", "miou.average", "forgetting", "bwt",
                 "dice.cases", "hd95[mm]", "dice.tasks", "bwtr", "wcd", "forgetting.semantics",
                 "forgetting.appearance"):  # fmt: skip
        value = evaluate(name, results, 2)
        assert value == UNDEFINED and value.why == why, name
        assert evaluate(name, results, 1) == evaluate(name, whole, 1)
    # classes that the set labels are not compared with those of before; others are measured as ever
    assert [c for c, v in results.class_values("dice", 2).items() if v.value is None] == [1, 2]
    assert results.class_values("dice", 2)[1].why == why
    assert results.class_values("dice", 2)[3] == whole.class_values("dice", 2)[3]
    assert [c for c, v in case_values("hd95[mm]", results, 2).items() if v.why == why] == [None, 1, 2]
    assert group_matrix(results)[2] == [None, *group_matrix(whole)[2][1:]]
    rows = results_rows(results)
    assert not [r for r in rows if r.after_task == 2 and r.class_id is None]
    assert {r.class_id for r in rows if r.after_task == 2} == {0, 3, 4}
    assert results_document(results, rows)["not_computable"]["2"]["wcd"] == why  # type: ignore[index]


def test_a_set_with_fewer_cases_than_before_is_another_measurement(folder: Path) -> None:
    described = stream()
    after = made_up(described)
    cut = CaseCounts(after[2]["organs"].labels, after[2]["organs"].pixels[:2], after[2]["organs"].surfaces[:2])  # type: ignore[index]
    results = results_of(described, [after[0], after[1], {**after[2], "organs": cut}], folder)
    assert evaluate("dice.all", results, 2).why == "some of the test cases of task 'organs' are not at hand"
    assert evaluate("bwtr", results, 2).why == "some of the test cases of task 'organs' are not at hand"
    assert evaluate("dice.tasks", results, 1).value is not None


def test_a_set_that_labels_all_classes_is_missed_by_every_class(folder: Path) -> None:
    described = stream()
    after = made_up(described)
    counts = {t: counts_of(sets, described) for t, sets in enumerate(after)}
    for sets in counts.values():
        for one in sets.values():
            one.annotated = None
    del counts[2]["organs"]
    results = run_results(described, counts)
    assert all(v.value is None for v in results.class_values("iou", 2).values())
    assert evaluate("forgetting", results, 2).why == "the test cases of task 'organs' are not at hand"


@pytest.mark.parametrize(
    ("change", "figure", "why"),
    [
        ("zero", "bwtr", "task 'organs' was at 0 right after it was learned"),
        ("alone", "rma", "the model that learned task 'tumours' alone is at 0"),
        ("ledger", "mpe", "the ledger of task 2 lists no weights"),
        ("ledger", "drr", "task 2 has no ledger"),
        ("samples", "drr", "the method keeps samples, and does not say how many it replays"),
        ("replayed", "drr", "the number of training images of task 'tumours' is not known"),
        ("unmeasured", "dice.tasks", "task 'again' has no test cases"),
        ("empty", "dice.tasks", "no test case of task 'again' shows its structures"),
    ],
)
def test_reasons(change: str, figure: str, why: str, folder: Path) -> None:
    described = stream()
    after = made_up(described)
    kept = {t: KeptCounts(1000, change == "samples") for t in range(3)}
    alone = None
    if change == "zero":
        after[0]["organs"].pixels[..., 2] = 0
    if change == "ledger":
        del kept[1]
    if change == "alone":
        nothing = made_up(described)
        nothing[1]["tumours"].pixels[..., 2] = 0
        alone = results_of(described, nothing, folder)
    if change == "unmeasured":
        del after[2]["again"]
    if change == "empty":
        after[2]["again"].pixels[:, 1:] = 0
        after[2]["again"].pixels[:, 0] = 5
    numbers = {1: TaskNumbers(replayed=7)} if change == "replayed" else {}
    results = results_of(described, after, folder, kept=kept, numbers=numbers)
    value = evaluate(figure, RunResults(**{**vars(results), "alone": alone}), 2)
    assert value == UNDEFINED and value.why == why


def test_replay_burden_is_replayed_samples_by_new_ones(folder: Path) -> None:
    described = stream()
    tasks = [task.model_copy(update={"images": n}) for task, n in zip(described.tasks, (10, 40, 50), strict=True)]
    described = described.model_copy(update={"tasks": tuple(tasks)})
    kept = {t: KeptCounts(1000, t > 0) for t in range(3)}
    numbers = {1: TaskNumbers(replayed=8), 2: TaskNumbers(replayed=30)}
    results = results_of(described, made_up(described), folder, kept=kept, numbers=numbers)
    assert evaluate("drr", results, 2) == (pytest.approx(100 * (8 / 40 + 30 / 50) / 2), 2)
    assert evaluate("drr", results, 1) == (pytest.approx(20), 1)


def test_numbers_that_are_damaged_are_told(folder: Path) -> None:
    for text in ("{", "[]", '{"replayed": -1}', '{"earlier": [101]}', '{"untrained": NaN}', '{"other": 1}'):
        (folder / "numbers.json").write_text(text)
        with pytest.raises(DataError, match=r"numbers\.json"):
            read_numbers(folder / "numbers.json")


def test_photographs_with_one_set_for_all_tasks(folder: Path) -> None:
    """d[t][j] is then the Dice of task j's classes on that set."""
    described = stream(NEW)
    after = []
    for sets in made_up(described):
        labels = sets["organs"].labels
        pixels = np.concatenate([cases.pixels for cases in sets.values()])
        after.append({"test": CaseCounts(labels, pixels, np.full(pixels.shape, np.nan))})
    tables = {t: table_of(sets, folder) for t, sets in enumerate(after)}
    counts = {}
    for t, sets in enumerate(after):
        right = np.diag(sets["test"].pixels[..., 2].sum(0))
        counts[t] = {"test": ConfusionMatrix(sets["test"].labels, right, cases=len(sets["test"].pixels))}
    results = run_results(described, counts, cases=tables)
    d = [dice(after[2], "test", group) for group in NEW]
    assert evaluate("dice.tasks", results, 2) == (pytest.approx(np.mean(d), abs=1e-5), 3)
    first = dice(after[0], "test", NEW[0])
    second = dice(after[1], "test", NEW[1])
    wanted = 100 * np.mean([(d[0] - first) / first, (d[1] - second) / second])
    assert evaluate("bwtr", results, 2).value == pytest.approx(wanted, abs=1e-5)
    assert evaluate("forgetting.appearance", results, 2).why == "no task annotates a structure of an earlier one"
    merged = described.model_copy(update={"tasks": (described.tasks[2].model_copy(
        update={"index": 0, "old": (), "new": (1, 2, 3, 4), "name": "joint"}),)})  # fmt: skip
    joint = run_results(merged, {0: counts[2]}, cases={0: tables[2]})
    assert evaluate("dice.tasks", joint, 0).value == pytest.approx(np.mean(d), abs=1e-5)


def test_a_joint_run_is_measured_on_the_sets_of_all_tasks(folder: Path) -> None:
    described = stream()
    after = made_up(described)
    merged = described.model_copy(update={"tasks": (described.tasks[2].model_copy(
        update={"index": 0, "old": (), "new": (1, 2, 3, 4), "name": "joint"}),)})  # fmt: skip
    joint = run_results(merged, {0: counts_of(after[2], described)}, cases={0: table_of(after[2], folder)})
    assert evaluate("dice.tasks", joint, 0) == (pytest.approx(d_matrix(after)[2].mean(), abs=1e-5), 3)
    assert evaluate("bwtr", joint, 0) == UNDEFINED


def test_a_joint_run_is_not_asked_for_structures_of_other_sets(folder: Path) -> None:
    """A false alarm of another set's structure costs that structure's own figure, and not this set's Dice."""
    described = stream()
    after = made_up(described)
    wanted = d_matrix(after)[2].mean()
    first, *_ = after[2].values()
    absent = np.flatnonzero(first.pixels[..., 0].sum(0)[1:] == 0) + 1
    assert len(absent)
    first.pixels[:, absent, 1] = 7  # predicted everywhere, never there
    merged = described.model_copy(update={"tasks": (described.tasks[2].model_copy(
        update={"index": 0, "old": (), "new": (1, 2, 3, 4), "name": "joint"}),)})  # fmt: skip
    joint = run_results(merged, {0: counts_of(after[2], described)}, cases={0: table_of(after[2], folder)})
    assert evaluate("dice.tasks", joint, 0) == (pytest.approx(wanted, abs=1e-5), 3)


def test_result_files_hold_them_all(folder: Path) -> None:
    described = stream()
    kept = {t: KeptCounts(1000, False) for t in range(3)}
    results = results_of(described, made_up(described), folder, kept=kept)
    rows = write_results(folder, results)
    assert read_results(folder / "results.csv") == rows
    found = {(r.figure, r.class_id) for r in rows if r.after_task == 2}
    for name in ("dice.cases", "dice.cases[sd]", "hd95[mm]", "hd95[mm,ci-low]", "asd[mm]", "nsd[mm,2]",
                 "nsd[mm,2,ci-high]"):  # fmt: skip
        assert {(name, None), (name, 1), (name, 4)} <= found, name
    for name in ("dice.tasks", "wcd", "bwtr", "mpe", "drr", "forgetting.appearance[max-last]",
                 "forgetting.semantics[first-last]"):  # fmt: skip
        assert (name, None) in found, name
    before = (folder / "results.csv").read_bytes(), (folder / "results.json").read_bytes()
    write_results(folder, results_of(described, made_up(described), folder, kept=kept))
    assert ((folder / "results.csv").read_bytes(), (folder / "results.json").read_bytes()) == before
