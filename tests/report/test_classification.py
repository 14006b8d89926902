"""Pages of runs whose images have one class each: confusion, samples, comparison."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from perdure.errors import UsageError
from perdure.files import read_tensors, write_tensors
from perdure.metrics.confusion import ConfusionMatrix, read_counts
from perdure.metrics.measured import run_results
from perdure.report.compare import compare
from perdure.report.compare_page import write_comparison
from perdure.report.page import write_model_card, write_report
from perdure.report.run_data import load_run
from perdure.report.tables import confusion_tables
from perdure.streams.description import parse_stream

TRANSDUCTIVE = "class-incremental 4-2, unlabelled test images (transductive) in training"
LAST = "tasks/03-eight-nine"

REST = {"recurs": False, "preparation": {"kind": "as_is"}}


def section(page: str, name: str) -> str:
    """One section of a page."""
    return page[page.index(f'<section id="{name}">') :].split("</section>")[0]


def test_report_speaks_of_images(check_page, make_class_run) -> None:
    run = make_class_run()
    page = check_page(write_report(run))
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Over the stream",
        "Each class after each task",
        "Figures after each task",
        "Which class is taken for which",
        "The same test samples after each task",
        "Pictures that the method keeps",
        "Are synthetic images copies?",
        "The stream",
        "What is kept of the past",
        "Recipe and environment",
        "What the figures mean",
    ]
    assert page.count("<svg") == 3
    assert not re.search(r"pixels\"|miou|iou\b|IoU", page.replace("(pixels; images in classification)", ""))
    titles = re.findall(r'<div class="title">(.*?)</div>', page)
    assert titles == ["accuracy", "balanced accuracy", "forgetting", "accuracy, average over tasks"]
    assert "points of accuracy lost" in page
    truth = read_counts(run / LAST / "counts.json")["test"]
    row = section(page, "classes").split("</i>five</th>")[1].split("</tr>")[0]
    recall = 100 * truth.matrix[6, 6] / 100
    assert f"recall {recall:.2f} % over 100 images" in row
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_confusion_tables_hold_the_counts_in_learning_order(make_class_run) -> None:
    run = load_run(make_class_run(method="finetune"))
    tables = confusion_tables(run.results)
    assert [t.task.index for t in tables] == [3, 2, 1, 0]
    last = tables[0]
    counts = run.results.counts[3]
    numbers = [[int(c.text.replace(",", "") or 0) for c in row.cells] for row in last.rows]
    assert numbers == counts.matrix[1:, 1:].tolist()
    assert [row.total for row in last.rows] == counts.matrix[1:, 1:].sum(1).tolist()
    assert [row.edge for row in last.rows] == list(last.edges)
    assert [n for n, edge in zip(last.names, last.edges, strict=True) if edge] == ["four", "six", "eight"]
    wrong = counts.matrix[1, 9]
    assert last.rows[0].cells[8].title == f"zero called eight: {wrong} of 50 images, {100 * wrong / 50:.1f} %"
    assert last.rows[0].cells[8].kind == "edge"
    assert last.rows[0].cells[0].kind == "right"
    assert last.rows[0].cells[8].style != last.rows[0].cells[0].style


def test_only_the_last_confusion_table_is_open(make_class_run, make_run) -> None:
    part = section(write_report(make_class_run("classes")).read_text(), "confusion")
    assert part.count('<table class="confusion numbers">') == 4
    assert part.index("<table") < part.index("<details>")
    assert part.count("<details>") == 3
    part = section(write_report(make_run("pixels")).read_text(), "confusion")
    assert part.count('<table class="confusion') == 1, "of pixels only the last one"


@pytest.mark.parametrize(("classes", "size", "tables"), [(16, "numbers", 2), (17, "small", 2), (49, "tiny", 1)])
def test_many_classes_get_smaller_cells(classes: int, size: str, tables: int) -> None:
    ids = list(range(1, classes + 1))
    stream = parse_stream({
        "protocol": "p", "dataset": "d", "background": None, "kind": "classification", "patients": False,
        "groups": [ids[:2], ids[2:]],
        "classes": [{"id": c, "name": f"c{c}", "kind": "thing", "color": [c, c, c]} for c in ids],
        "tasks": [{"index": 0, "name": "a", "new": ids[:2], "old": [], "annotated": ids[:2], **REST},
                  {"index": 1, "name": "b", "new": ids[2:], "old": ids[:2], "annotated": ids[2:], **REST}],
    })  # fmt: skip
    known = {0: ids[:2], 1: ids}
    counts = {t: {"x": ConfusionMatrix((0, *seen), np.diag([0, *seen]))} for t, seen in known.items()}
    found = confusion_tables(run_results(stream, counts))
    assert (len(found), found[0].size) == (tables, size)
    assert found[0].rows[1].cells[1].text == ("2" if size == "numbers" else "")
    assert found[0].rows[1].cells[1].title.startswith("c2 called c2: 2 of 2 images, 100.0 %")


@pytest.mark.parametrize("sealed", [0, 1, 2])
def test_partly_done_runs(check_page, make_class_run, sealed: int) -> None:
    page = check_page(write_report(make_class_run(sealed=sealed)))
    assert ('id="confusion"' in page) == (sealed > 0)
    assert ('id="pictures"' in page) == (sealed > 0)


def test_joint_run_has_no_curves_and_one_confusion_table(check_page, make_class_run) -> None:
    page = check_page(write_report(make_class_run(method="joint")))
    assert "<svg" not in page
    assert section(page, "confusion").count('<table class="confusion') == 1
    assert section(page, "confusion").count('<tr class="edge">') == 3


def test_samples_say_which_class_and_whether_it_is_right(make_class_run) -> None:
    part = section(write_report(make_class_run()).read_text(), "samples")
    rows = part.split("<tbody>")[1].split("</tr>")[:3]
    assert [re.findall(r'<span class="(\w+)" title', row) for row in rows] == [
        ["right", "right", "right", "wrong"],
        ["before", "right", "right", "right"],
        ["before", "before", "before", "right"],
    ]
    assert "<b>✗</b> nine" in rows[0]
    assert [row.count("<img") for row in rows] == [1, 1, 1]
    assert 'style="width:64px;height:64px"' in rows[0]


def test_model_card_speaks_of_images(make_class_run) -> None:
    card = write_model_card(make_class_run(protocol=TRANSDUCTIVE)).read_text()
    assert "A classification model that learned 10 of 10 classes" in card
    assert "Recall in %" in card
    assert "Labels: one class for each image" in card
    assert "**Note:** the protocol is transductive" in card
    assert "segment" not in card
    assert "background" not in card.split("### Definitions")[1].split("## Data")[1]


def test_transductive_protocols_are_noted(check_page, make_class_run, tmp_path: Path) -> None:
    plain, open_ = make_class_run("plain"), make_class_run("open", protocol=TRANSDUCTIVE)
    assert "The protocol is transductive" not in check_page(write_report(plain))
    assert "The protocol is transductive" in check_page(write_report(open_))
    with pytest.raises(
        UsageError, match=r"their protocol is not the same \('class-incremental 4-2 overlap' and '.*tra"
    ):
        compare([plain, open_])
    both = [open_, make_class_run("other", method="finetune", protocol=TRANSDUCTIVE)]
    (note,) = compare(both).notes
    assert note.startswith("the protocol is transductive")
    write_comparison(both, tmp_path / "c.html")
    assert "The protocol is transductive" in check_page(tmp_path / "c.html")


def test_joint_runs_of_another_protocol_are_noted(make_class_run) -> None:
    joint = make_class_run("joint", method="joint", protocol=f"{TRANSDUCTIVE}, merged")
    notes = compare([make_class_run("plain"), joint]).notes
    assert any("protocols of joint and other runs differ" in note and TRANSDUCTIVE in note for note in notes)
    assert any("transductive: test images" in note and note.endswith("(runs joint)") for note in notes)
    assert not any("protocol" in n for n in compare([make_class_run("p"), make_class_run("j", method="joint")]).notes)


def test_kinds_do_not_mix(make_class_run, make_run) -> None:
    with pytest.raises(UsageError, match="their kind of labels is not the same"):
        compare([make_class_run("a"), make_class_run("b", kind="segmentation")])


def test_comparison_page(check_page, make_class_run, tmp_path: Path) -> None:
    runs = [make_class_run("f", method="finetune"), make_class_run("s"), make_class_run("j", method="joint")]
    c = write_comparison(runs, tmp_path / "compare.html")
    assert c.figures == (
        "accuracy.all[bg=out]",
        "accuracy.mean[bg=out,absent=skip]",
        "forgetting[max-last,of=accuracy]",
        "accuracy.average[bg=out]",
        "intransigence[of=accuracy]",
    )
    assert c.best["accuracy.all[bg=out]"] == "star"
    page = check_page(tmp_path / "compare.html")
    assert page.count("<svg") == 3
    assert "recall" in section(page, "classes")
    assert section(page, "samples").count('class="wrong" title') == 2
    pictures = section(page, "pictures")
    assert pictures.count("<img") == 50
    assert "<th>star: means</th><th>star: dreamed</th>" in pictures
    assert "accuracy, average over tasks" in page
    first = (tmp_path / "compare.html").read_bytes()
    write_comparison(runs, tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_bytes() == first


def test_kept_pictures_of_two_runs_stand_side_by_side(make_class_run, tmp_path: Path) -> None:
    a, b = make_class_run("a"), make_class_run("b")
    (b / "recipe.yaml").write_text(yaml.safe_dump({"seed": 1, "method": {"name": "star", "weight": 2}}))
    kept = b / LAST / "kept/means.safetensors"
    write_tensors(kept, {k: t[:3] for k, t in read_tensors(kept).items()})
    write_comparison([a, b], tmp_path / "c.html")
    rows = section((tmp_path / "c.html").read_text(), "pictures").split("<tbody>")[1].split("</tr>")[:-1]
    assert [row.count("<img") for row in rows] == [10] * 3 + [9] * 7
