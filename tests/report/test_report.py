"""The HTML pages: well-formed, self-contained, nothing private, right also when a run is half done."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from perdure.errors import DataError, RunError
from perdure.labels import label_space
from perdure.metrics.cases import CaseCounts, write_cases
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.measured import run_results
from perdure.report.page import write_model_card, write_report
from perdure.report.plots import Line, curves
from perdure.report.run_data import load_run, without_places
from perdure.report.tables import confusion_tables, mistakes
from perdure.streams.description import called, parse_stream


def test_report_shows_all_that_a_reader_asks_first(check_page, make_run) -> None:
    run = make_run("night-1")
    path = write_report(run)
    page = check_page(path)
    assert path == run / "report.html"
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Over the stream",
        "Each class after each task",
        "Figures after each task",
        "Which class is taken for which",
        "The same test samples after each task",
        "The stream",
        "What is kept of the past",
        "Recipe and environment",
        "What the figures mean",
    ]
    assert page.count("<svg") == 2
    assert page.count("<img") == 3 * (2 + 4)
    assert "all 4 tasks are done" in page
    assert "20,604" in page
    assert "2,060 B" in page


def test_numbers_of_the_page_are_those_of_the_results(make_run) -> None:
    run = make_run()
    page = write_report(run).read_text()
    lines = [line.split(",") for line in (run / "results.csv").read_text().splitlines()]
    final = next(line for line in lines if line[0] == "3" and "hiou[bg=in" in ",".join(line))
    assert f'<div class="value">{float(final[-3]):.1f}<span' in page


def test_cells_before_a_class_is_taught_are_blank_and_hatched(make_run) -> None:
    page = write_report(make_run()).read_text()
    assert page.count('<td class="before" title="not taught yet"></td>') == 2 * 1 + 2 * 2 + 2 * 3
    assert page.count('<td class="taught"') == 11
    row = page[page.index("</i>nine</th>") :].split("</tr>")[0]
    assert re.findall(r'<td class="(before|taught)', row) == ["before"] * 3 + ["taught"]


def test_equal_runs_give_equal_bytes(make_run) -> None:
    first = write_report(make_run("a/run")).read_bytes()
    second = write_report(make_run("b/run")).read_bytes()
    assert first == second


def test_no_place_of_this_machine_is_told(check_page, make_run, tmp_path: Path) -> None:
    run = make_run()
    texts = check_page(write_report(run)) + write_model_card(run).read_text()
    for secret in ("/secret", "secret-host", str(tmp_path), str(Path.home()) + "/"):
        assert secret not in texts
    assert "…/digits" in texts


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/data/voc", "…/voc"),
        ("~/data/voc", "…/voc"),
        ("C:\\data\\voc", "…/voc"),
        ("read from /a/b/c.txt, then", "read from …/c.txt, then"),
        ("a/b", "a/b"),
        ("./runs/x", "./runs/x"),
        ("1/2", "1/2"),
        ("km/h", "km/h"),
        (3, 3),
        ({"hostname": "x", "cpu": ["/a/b"]}, {"cpu": ["…/b"]}),
    ],
)
def test_places_are_shortened(value: object, shown: object) -> None:
    assert without_places(value) == shown


@pytest.mark.parametrize("sealed", [0, 1, 2])
def test_partly_done_runs(check_page, make_run, sealed: int) -> None:
    run = make_run(sealed=sealed)
    page = check_page(write_report(run))
    assert f"{sealed} of 4 tasks done" in page
    assert page.count('<span class="pill warn">to do</span>') == 4 - sealed
    assert ("No task is measured yet" in page) == (sealed == 0)
    assert page.count("<svg") == {0: 0, 1: 1, 2: 2}[sealed]
    card = write_model_card(run).read_text()
    assert f"{sealed} of 4 tasks" in card
    assert "The run is not finished" in card


def test_a_task_without_the_done_mark_is_left_out(check_page, make_run) -> None:
    run = make_run()
    (next((run / "tasks").glob("02-*")) / "done").unlink()
    data = load_run(run)
    assert (data.sealed, data.results.last, set(data.ledgers), set(data.samples)) == (2, 1, {0, 1}, {0, 1})
    check_page(write_report(run))


def test_joint_run_has_figures_of_old_and_new_classes_and_no_curves(check_page, make_run) -> None:
    page = check_page(write_report(make_run(method="joint")))
    assert "all 1 task is done" in page
    assert "<svg" not in page
    assert "since learned" not in page
    assert "not taught yet" not in page
    values = re.findall(r'<div class="value">(.*?)<', page)
    assert values[1] != "–"
    assert values[4] == "–"


def test_pictures_of_patients_are_shown_only_where_the_recipe_says_so(check_page, make_run) -> None:
    run = make_run("plain")
    stream = (run / "stream.json").read_text()
    (run / "stream.json").write_text(stream.replace('"patients": false', '"patients": true'))
    page = check_page(write_report(run))
    assert "<img" not in page
    assert "the images come from patients" in page
    assert "Not a medical device" in write_model_card(run).read_text()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"report": {"patient_samples": True}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert check_page(write_report(run)).count("<img") == 18


def test_streams_without_background_lead_with_bg_out(check_page, make_run) -> None:
    page = check_page(write_report(make_run(background=None)))
    assert "miou.all<wbr>[bg=out" in page
    assert "</i>unlabelled</th>" not in page


def test_names_cannot_break_the_page(check_page, make_run) -> None:
    run = make_run()
    stream = (run / "stream.json").read_text()
    (run / "stream.json").write_text(
        stream.replace('"nine"', '"<script>alert(1)</script>|\\u0000&"').replace("\\u0000", "")
    )
    page = check_page(write_report(run))
    assert "&lt;script&gt;" in page
    card = write_model_card(run).read_text()
    assert "<script" not in card and "&lt;script&gt;alert(1)&lt;/script&gt;\\|&amp;" in card


def test_other_folders_and_damaged_files_are_plain_errors(make_run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        write_report(tmp_path)
    run = make_run()
    ledger = next((run / "tasks").glob("01-*")) / "ledger.json"
    ledger.write_text('{"items": [{"name": "x"}]}')
    with pytest.raises(DataError, match="not a ledger"):
        write_report(run)
    ledger.unlink()
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(DataError, match=r"could not read .*recipe\.yaml"):
        write_report(run)


def test_model_card_tells_history_figures_and_what_is_kept(make_run) -> None:
    run = make_run()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"licence": "CC0", "notes": "scenes of\ndigits"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = write_model_card(run).read_text()
    assert "learned 10 of 10 classes of **digits** in 4 of 4 tasks" in card
    assert "| 2 | four-five | four, five | the same | – | 0 | – | done |" in card
    assert "Licence: CC0" in card
    assert "Notes: scenes of digits" in card
    assert "| statistics | statistics | 20,604 |" in card
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    heat = [line for line in tables if line.startswith(("| 10 | nine", "| 0 | background"))]
    assert [line.count("|") for line in heat] == [8, 8]


def test_curves_are_inline_and_the_same_each_time(page_markup) -> None:
    lines = [Line('a "quoted" & <b>', [1.0, None, 3.0], 0, dashed=True), Line("empty", [None] * 3, 1)]
    svg = curves("x", lines, ["1", "2", "3"], "figure")
    assert svg == curves("x", lines, ["1", "2", "3"], "figure")
    assert svg.startswith("<svg role=")
    assert "xmlns" not in svg
    assert "#0a0b" not in svg
    assert "#010203" not in svg
    assert "var(--s0)" in svg
    assert not page_markup(svg).wrong
    assert curves("y", lines[1:], ["1", "2", "3"], "figure") == ""


@pytest.mark.slow
def test_a_browser_shows_the_page(make_run, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    page = write_report(make_run())
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1200,900"]
    subprocess.run([browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()],
                   check=True, capture_output=True, timeout=300)  # fmt: skip
    from PIL import Image

    with Image.open(shot) as image:
        assert len(set(image.convert("RGB").resize((240, 180)).getdata())) > 200


def test_the_page_says_what_was_measured_and_how_long_it_took(make_run, check_page) -> None:
    run = make_run()
    described = json.loads((run / "stream.json").read_text())
    for task, images in zip(described["tasks"], (1200, 30, 40, 50), strict=True):
        task["images"] = images
    (run / "stream.json").write_text(json.dumps(described))
    ends = [70, 200, 200.4, 4000]
    lines = [{"seconds": s, "task": t, "event": "sealed", "hiou[bg=in]": 1.0} for t, s in enumerate(ends, 1)]
    broken = ["{", "[]", '{"seconds": "x", "task": 1, "event": "sealed"}', '{"event": "sealed"}']
    (run / "log.jsonl").write_text("\n".join([*broken, *map(json.dumps, lines)]) + "\n")
    page, card = check_page(write_report(run)), write_model_card(run).read_text()
    for text in ("1,200", "1 min 10 s", "2 min 10 s", "1 h 03 min", "All tasks together took 1 h 06 min"):
        assert text in page and text in card, text
    assert "class-incremental 4-2 overlap" in card and "whole images" in card
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines[1:])))
    page = check_page(write_report(run))  # the end of the first task is not in the log: nobody knows how long it took
    assert "All tasks together" not in page and "2 min 10 s" not in page and "1 h 03 min" in page


def test_dice_of_single_images_is_shown_with_its_spread(make_run, check_page) -> None:
    run = make_run()
    pixels = np.zeros((3, 11, 3), np.int64)
    pixels[:, 1] = [[10, 10, 10], [10, 0, 0], [10, 10, 5]]  # Dice 100, 0, 50
    pixels[0, 4] = [8, 8, 2]
    write_cases(next(run.glob("tasks/03*")) / "cases.csv", {"test": CaseCounts(tuple(range(11)), pixels)})
    part = check_page(write_report(run)).partition('id="cases"')[2].partition("</section>")[0]
    part, _, statistics = part.partition('id="case-figures"')
    assert "dice.cases" in statistics and "hd95" not in statistics, "no spacing in mm"
    assert re.search(r"50\.0 <span class=\"sd\">± 50\.0</span> \[0\.0, 100\.0\]", statistics)
    zero, three = (row for row in part.partition("</table>")[0].split("<tr>")[2:])
    assert [cell.partition("<")[0].strip() for cell in zero.split('<td class="n">')[1:]] == [
        *("3", "50.0", "0.0", "25.0", "50.0", "75.0")
    ]
    assert "± 50.0" in zero and ">zero</th>" in zero
    assert "±" not in three and "25.0" in three
    assert 'id="cases"' not in check_page(write_report(make_run("older"))), "a run that did not record them"


def test_confusion_of_a_segmentation_run(make_run, check_page) -> None:
    """Shares of the rows, and what each class is taken for, the least recognised first."""
    page = check_page(write_report(make_run(method="finetune")))
    part = page.partition('id="confusion"')[2].partition("</section>")[0]
    table, _, list_of = part.partition("What classes are most often taken for")
    assert table.count("<tr") == 2 + 11 and "numbers: % of the row" in table
    rights = [float(cell.partition(" %")[0]) for cell in list_of.split('<td class="n">')[1:]]
    assert len(rights) == 11 and rights == sorted(rights)
    assert re.search(r"background \d+\.\d %", list_of)


def test_confusion_can_be_read_with_150_classes() -> None:
    names = [f"class {k}" for k in range(1, 151)]
    classes = [{"id": c.id, "name": c.name, "kind": c.kind, "color": list(c.color)} for c in label_space(names).classes]
    ids = list(range(1, 151))
    task = {"index": 0, "name": "all", "new": ids, "old": [], "annotated": ids, "recurs": False}
    described = {"protocol": "150", "dataset": "d", "background": None, "patients": False, "classes": classes,
                 "tasks": [task | {"preparation": {"kind": "as_is"}}], "groups": [ids]}  # fmt: skip
    counts = ConfusionMatrix.empty(ids)
    counts.matrix[np.diag_indices(151)] = 1000
    counts.matrix[7, 9], counts.matrix[7, 11], counts.matrix[7, 13], counts.matrix[7, 15] = 500, 300, 199, 1
    counts.matrix[20] = 0
    results = run_results(parse_stream(described), {0: {"test": counts}})
    assert confusion_tables(results) == []
    first, *others = mistakes(results)
    assert (first.name, first.total, first.recall) == ("class 7", 2000, 50)
    assert [(name, round(share, 2)) for name, _, share in first.taken] == [
        *(("class 9", 25), ("class 11", 15), ("class 13", 9.95))
    ]
    assert len(others) == 148 and "class 20" not in [m.name for m in others], "the ground truth does not hold it"
    assert {m.recall for m in others} == {100}


def test_what_is_not_counted_is_named_where_it_is(make_run) -> None:
    run = make_run()
    page = write_report(run).read_text()
    assert page.count("not counted</span>") == 1 and "repeating-linear-gradient(135deg,#ffffff" in page
    for path in (run / "tasks").glob("*/samples/*.error.png"):
        with Image.open(path) as picture:
            pixels = np.array(picture)
        pixels[:2] = 0  # no pixel is ignored any more
        Image.fromarray(pixels).save(path)
    page = write_report(run).read_text()
    assert "not counted" not in page and "false alarm</span>" in page


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("01-15", 15, "classes 1 to 15"),
        ("16-17", 2, "classes 16 to 17"),
        ("sheep", 1, "sheep"),
        ("2-3", 1, "2-3"),
        ("01-15", 3, "01-15"),
    ],
)
def test_tasks_that_are_named_by_places_are_called_so(name: str, classes: int, expected: str) -> None:
    assert called(name, classes) == expected


def test_pages_call_tasks_by_words(make_run) -> None:
    run = make_run()
    described = json.loads((run / "stream.json").read_text())
    for task, name in zip(described["tasks"], ("01-04", "05-06", "07-08", "09-10"), strict=True):
        (run / "tasks" / f"{task['index']:02d}-{task['name']}").rename(run / "tasks" / f"{task['index']:02d}-{name}")
        task["name"] = name
    (run / "stream.json").write_text(json.dumps(described))
    for page in (write_report(run).read_text(), write_model_card(run).read_text()):
        assert "after classes 1 to 4" in page and "classes 9 to 10" in page
        assert "01-04" not in page and "task classes" not in page


def test_sample_pictures_are_counted_by_image(make_run) -> None:
    run = make_run()
    for page in (write_report(run).read_text(), write_model_card(run).read_text()):
        assert "3 test images, four pictures each" in page and "one test image" not in page


def test_head_and_environment_are_in_words(make_run) -> None:
    run = make_run("night-1")
    weights = {"source": "packed 1.0", "sha256": "0123456789abcdef" * 4, "licence": "Apache-2.0"}
    (run / "environment.json").write_text(json.dumps({"first_weights": weights, "gpu": None}))
    page = write_report(run).read_text()
    assert "<title>demo (night-1)" in page
    assert "packed 1.0, licence Apache-2.0, SHA-256 0123456789ab…" in page and "first_weights" not in page
    assert "Bytes needed after each task" in page
