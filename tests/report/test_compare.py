from __future__ import annotations

import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from perdure.errors import RunError, UsageError
from perdure.metrics.cases import CaseCounts, write_cases
from perdure.metrics.confusion import read_counts, write_counts
from perdure.metrics.results import read_results, to_csv
from perdure.report.compare import compare, comparison_table
from perdure.report.compare_page import write_comparison
from perdure.report.page import write_model_card, write_report

ALL = "miou.all[bg=in,absent=skip]"
FORGETTING = "forgetting[max-last]"


def final(run: Path, name: str, after: int) -> float:
    return next(r.value for r in read_results(run / "results.csv") if (r.figure, r.after_task) == (name, after))


def test_values_are_those_of_the_runs_and_the_best_is_marked(make_run) -> None:
    runs = [make_run("f", method="finetune"), make_run("s"), make_run("j", method="joint")]
    c = compare(runs)
    by_label = {e.label: e for e in c.entries}
    assert list(by_label) == ["finetune", "star", "joint"]
    assert (c.after, c.task, c.tasks) == (3, "eight-nine", 4)
    assert by_label["star"].scores[ALL].mean == pytest.approx(final(runs[1], ALL, 3))
    assert by_label["star"].scores[ALL].sd is None
    assert by_label["joint"].scores[ALL].mean == pytest.approx(final(runs[2], ALL, 0))
    assert by_label["joint"].scores[FORGETTING].mean is None
    assert by_label["joint"].reference
    assert c.best[ALL] == "star", "joint training is a reference and does not compete"
    assert c.best[FORGETTING] == "star", "less forgetting is better"
    assert c.figures[-1] == "intransigence"
    assert by_label["star"].scores["intransigence"].mean is not None
    assert by_label["star"].kept_bytes == 20_604
    assert by_label["finetune"].kept_bytes == 0
    assert json.loads(json.dumps(c.to_json()))["best"] == c.best


def test_runs_that_differ_by_seed_become_mean_and_deviation(make_run) -> None:
    runs = [make_run(f"s{k}", seed=k) for k in (1, 2, 3)]
    c = compare([*runs, make_run("f", method="finetune")], [ALL])
    entry = c.entries[0]
    values = [final(run, ALL, 3) for run in runs]
    assert entry.label == "star (3 runs)"
    assert entry.seeds == (1, 2, 3)
    assert entry.scores[ALL].values == tuple(values)
    assert entry.scores[ALL].mean == pytest.approx(statistics.fmean(values))
    assert entry.scores[ALL].sd == pytest.approx(statistics.stdev(values))
    assert c.figures == (ALL,)


def test_one_method_with_two_settings_stays_two_entries(make_run) -> None:
    a, b = make_run("short"), make_run("long")
    recipe = (b / "recipe.yaml").read_text()
    (b / "recipe.yaml").write_text(recipe.replace("epochs: 3", "epochs: 9"))
    found = compare([a, b])
    assert [e.label for e in found.entries] == ["short", "long"]
    assert "not only the methods differ: training.epochs: 3 (short), 9 (long)" in found.notes


def test_half_done_runs_are_compared_after_the_last_common_task(make_run) -> None:
    runs = [make_run("f", method="finetune"), make_run("s", sealed=2), make_run("j", method="joint")]
    c = compare(runs)
    assert c.after == 1
    assert c.entries[0].scores[ALL].mean == pytest.approx(final(runs[0], ALL, 1))
    assert c.entries[2].scores[ALL].mean is None
    assert any("after task 2 of 4" in note for note in c.notes)


def test_names_of_figures_follow_the_background(make_run) -> None:
    runs = [make_run("a", background=None), make_run("b", method="finetune", background=None)]
    assert compare(runs, ["miou.all", "hiou[absent=zero]"]).figures == (
        "miou.all[bg=out,absent=skip]",
        "hiou[bg=out,absent=zero]",
    )


def test_what_cannot_be_compared_is_a_plain_error(make_run, tmp_path: Path) -> None:
    good = make_run("good")
    other = make_run("other")
    stream = json.loads((other / "stream.json").read_text())
    for key, value, word in (
        ("dataset", "voc", "data set"),
        ("protocol", "4-2 disjoint", "protocol"),
        ("background", None, "background"),
        ("classes", [stream["classes"][0] | {"name": "null"}, *stream["classes"][1:]], "classes"),
    ):
        (other / "stream.json").write_text(json.dumps(stream | {key: value}))
        with pytest.raises(UsageError, match=f"'good' and 'other' cannot be compared: their {word}"):
            compare([good, other])
    swapped = [stream["tasks"][0] | {"new": [4, 3, 2, 1]}]
    swapped += [task | {"old": [4, 3, 2, 1, *task["old"][4:]]} for task in stream["tasks"][1:]]
    (other / "stream.json").write_text(
        json.dumps(stream | {"tasks": swapped, "groups": [[4, 3, 2, 1], *stream["groups"][1:]]})
    )
    with pytest.raises(UsageError, match="split of the classes into tasks"):
        compare([good, other])
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])
    with pytest.raises(UsageError, match="no finished task"):
        compare([good, make_run("fresh", sealed=0)])
    with pytest.raises(UsageError, match=r"unknown figure 'mioo\.all'"):
        compare([good], ["mioo.all"])
    with pytest.raises(UsageError, match="one value for each class"):
        compare([good], ["iou"])
    with pytest.raises(RunError, match="not a run folder"):
        compare([good, tmp_path / "nowhere"])


def test_table_for_the_terminal(make_run) -> None:
    c = compare([make_run("f", method="finetune"), make_run("s1", seed=1), make_run("s2", seed=2)])
    screen = io.StringIO()
    Console(file=screen, width=80, force_terminal=False).print(comparison_table(c))
    text = screen.getvalue()
    score = c.entries[1].scores[ALL]
    assert f"{score.mean:.1f} ± {score.sd:.1f}" in text
    assert "miou.old[bg=in,absent=skip] ↑" in text
    assert "forgetting[max-last] ↓" in text
    assert "digits, class-incremental 4-2 overlap" in text
    assert "…" not in text


@pytest.mark.parametrize("names", [("f", "s", "j"), ("s",), ("j",), ("f", "half", "j"), ("clinic",)])
def test_page_is_complete_and_self_contained(check_page, make_run, tmp_path: Path, names: tuple[str, ...]) -> None:
    options = {"f": {"method": "finetune"}, "s": {}, "j": {"method": "joint"}, "half": {"sealed": 2},
               "clinic": {"patients": True}}  # fmt: skip
    runs = [make_run(n, **options[n]) for n in names]
    c = write_comparison(runs, tmp_path / "compare.html")
    page = check_page(tmp_path / "compare.html")
    assert c == compare(runs)
    shown = [n for n in names if not ("half" in names and n == "j")]
    assert page.count("<img") == (0 if "clinic" in names else 3 * (1 + 2 * len(shown)))
    assert page.count("<svg") == (0 if names == ("j",) else 4)
    assert page.count('class="delta"') == (len(shown) - 1) * (7 if "half" in names else 11)
    assert str(tmp_path) not in page
    before = (tmp_path / "compare.html").read_bytes()
    write_comparison(runs, tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_bytes() == before


CROP = {"kind": "photo2d", "size": 512, "protocol": "centre_crop", "window": 1024, "overlap": 0.25}
WHOLE = {"kind": "photo2d", "size": None, "protocol": "whole", "window": 1024, "overlap": 0.25}


def test_runs_that_were_measured_in_two_ways_are_not_compared(make_run) -> None:
    """A published centre crop is easier than whole images: two numbers that must not stand in one table."""
    runs = [make_run("a"), make_run("b", method="finetune")]
    for run, preparation in zip(runs, (CROP, WHOLE), strict=True):
        stream = json.loads((run / "stream.json").read_text())
        for task in stream["tasks"]:
            task["preparation"] = preparation
        (run / "stream.json").write_text(json.dumps(stream))
    with pytest.raises(
        UsageError, match=r"their evaluation is not the same \('the centre 512 × 512 of .*whole images at"
    ):
        compare(runs)
    words = ("the centre 512 × 512 of images", "whole images at their own size, in windows")
    for run, said in zip(runs, words, strict=True):
        assert f"Measured on {said}" in write_model_card(run).read_text()
        assert f"Measured on {said}" in write_report(run).read_text()


def test_figures_of_the_validation_set_say_so_and_do_not_mix(make_run, check_page, tmp_path) -> None:
    plain, chosen = make_run("plain"), make_run("chosen", measured="val")
    with pytest.raises(UsageError, match=r"measured split is not the same \('test' and 'validation'\)"):
        compare([plain, chosen])
    assert {row.split for row in read_results(chosen / "results.csv")} == {"val"}
    assert json.loads((chosen / "results.json").read_text())["split"] == "val"
    for run, says in ((plain, False), (chosen, True)):
        card, page = write_model_card(run).read_text(), check_page(write_report(run))
        assert ("evaluate.split: val" in card, "evaluate.split: val" in page) == (says, says)
        assert (f"{'Validation' if says else 'Test'} images after each task" in card) is True
        comparison = write_comparison([run], tmp_path / "c.html")
        assert comparison.split == ("val" if says else "test")
        assert any("evaluate.split: val" in note for note in comparison.notes) is says
        assert ("validation figures" in check_page(tmp_path / "c.html")) is says


def test_results_of_runs_without_a_split_are_of_test_images(make_run) -> None:
    rows = read_results(make_run() / "results.csv")
    old = [",".join(line.split(",")[:-1]) for line in to_csv(rows).splitlines()]
    path = make_run("old") / "results.csv"
    path.write_text("\n".join(old) + "\n")
    assert read_results(path) == rows


def with_cases(run: Path, dice: int) -> Path:
    """A run whose tasks recorded cases: two images in which each class has a Dice of so many percent."""
    for folder in sorted(run.glob("tasks/*")):
        labels = read_counts(folder / "counts.json")["all"].labels
        pixels = np.zeros((2, len(labels), 3), np.int64)
        pixels[:, 1:] = 100, 100, dice
        write_cases(folder / "cases.csv", {"all": CaseCounts(labels, pixels)})
    return run


def test_plasticity_is_measured_against_the_run_of_a_model_per_task(make_run, tmp_path: Path) -> None:
    runs = [with_cases(make_run("f", method="finetune"), 40), with_cases(make_run("s"), 60)]
    alone = with_cases(make_run("i", method="star", seed=2), 80)
    recipe = (alone / "recipe.yaml").read_text()
    (alone / "recipe.yaml").write_text(recipe.replace("name: star", "name: independent"))
    c = compare([*runs, alone], ["rma", "dice.tasks", "e-fwt"])
    assert [e.scores["rma"].mean for e in c.entries] == pytest.approx([50, 75, 100])
    assert [e.scores["dice.tasks"].mean for e in c.entries] == pytest.approx([40, 60, 80])
    assert [note for note in c.notes if "e-fwt" in note] == [
        "e-fwt is not computable: task 'four-five' annotates other classes than the first one"
    ]
    c = write_comparison(runs, tmp_path / "page.html", ["rma"])
    assert [e.scores["rma"].mean for e in c.entries] == [None, None]
    needs = "needs a run of the method 'independent' on the same stream: perdure compare"
    assert c.notes == (f"rma is not computable: {needs}",)
    assert "needs a run of the method" in (tmp_path / "page.html").read_text()


def test_the_report_says_which_test_cases_are_gone(make_run, check_page) -> None:
    run = with_cases(make_run(), 60)
    for folder in sorted(run.glob("tasks/*")):
        sets = read_counts(folder / "counts.json")
        write_counts(folder / "counts.json", {"all" if folder.name < "02" else "rest": sets["all"]})
    page, card = check_page(write_report(run)), write_model_card(run).read_text()
    assert "the test cases of the set 'all' are not at hand" in page.replace("&#39;", "'")
    assert (
        "The test cases" in page and "the test cases of the set 'all' are not at hand: figures that need them" in card
    )
    part = page.partition('id="continual"')[2].partition("</section>")[0].replace("&#39;", "'")
    assert "not computable: the test cases of the set 'all' are not at hand" in part
