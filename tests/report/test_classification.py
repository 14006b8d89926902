"""Pages of runs whose images have one class each: confusion, kept pictures, distances, samples."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from perdure.errors import DataError, UsageError
from perdure.files import read_tensors, write_tensors
from perdure.metrics.counts import Counts, read_counts
from perdure.metrics.described import parse_stream
from perdure.metrics.figures import make_evidence
from perdure.report.compare import compare
from perdure.report.compare_page import write_comparison
from perdure.report.confusion_tables import confusion_tables
from perdure.report.kept_items import ShownItem, picture_rows
from perdure.report.memorisation import memorisation
from perdure.report.model_card import write_model_card
from perdure.report.page import write_report
from perdure.report.plots import Strip, strips
from perdure.report.run_data import load_run

TRANSDUCTIVE = "class-incremental 4-2, unlabelled test images (transductive) in training"
LAST = "tasks/03-eight-nine"


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
    tables = confusion_tables(run)
    assert [t.task.index for t in tables] == [3, 2, 1, 0]
    last = tables[0]
    counts = run.evidence.counts[3]
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
    assert 'id="confusion"' not in write_report(make_run("pixels")).read_text()


@pytest.mark.parametrize(("classes", "size", "tables"), [(16, "numbers", 2), (17, "small", 2), (49, "tiny", 1)])
def test_many_classes_get_smaller_cells(make_class_run, classes: int, size: str, tables: int) -> None:
    run = load_run(make_class_run(sealed=0))
    ids = list(range(1, classes + 1))
    stream = parse_stream({
        "protocol": "p", "dataset": "d", "background": None, "kind": "classification", "groups": [ids[:2], ids[2:]],
        "classes": [{"id": c, "name": f"c{c}", "kind": "thing", "color": [c, c, c]} for c in ids],
        "tasks": [{"index": 0, "name": "a", "new": ids[:2], "old": [], "annotated": ids[:2]},
                  {"index": 1, "name": "b", "new": ids[2:], "old": ids[:2], "annotated": ids[2:]}],
    })  # fmt: skip
    known = {0: ids[:2], 1: ids}
    counts = {t: {"x": Counts((0, *seen), np.diag([0, *seen]))} for t, seen in known.items()}
    found = confusion_tables(dataclasses.replace(run, stream=stream, evidence=make_evidence(stream, counts)))
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
    assert section(page, "confusion").count("<table") == 1
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


def test_kept_pictures_stand_by_class_in_ledger_order(make_class_run) -> None:
    run = make_class_run()
    part = section(write_report(run).read_text(), "pictures")
    assert re.findall(r"<li><b>(.*?)</b> \((.*?)\): (.*?)</li>", part) == [
        ("means", "statistics, 2,560 B", "mean over all training images of the class"),
        ("dreamed", "preview, 10.2 kB", "made up by the network"),
    ]
    rows = part.split("<tbody>")[1].split("</tr>")[:-1]
    assert len(rows) == 10
    assert all(row.count("<img") == 5 for row in rows)
    assert 'alt="dreamed of nine, 4"' in rows[9]
    data = load_run(run)
    columns, found = picture_rows(data.stream, data.shown[3])
    assert [c.title for c in columns] == ["means", "dreamed"]
    assert [row.name for row in found if row.first] == ["zero", "four", "six", "eight"]


def item(path: Path, tensors: dict[str, torch.Tensor], shows: str = "images", kind: str = "synthetic") -> ShownItem:
    write_tensors(path, tensors)
    return ShownItem("x", kind, shows, 1, "made up", kind == "exemplars", path)


@pytest.fixture
def stream(make_class_run) -> Any:
    return load_run(make_class_run(sealed=0)).stream


@pytest.mark.parametrize(
    ("shape", "size", "shown", "more"),
    [
        ((4, 1, 28, 28), (56, 56), 1, 0),
        ((4, 3, 8, 16), (64, 32), 1, 0),
        ((4, 15, 1, 200, 100), (48, 96), 12, 3),
        ((10, 2, 5, 80, 80), (80, 80), 2, 0),
    ],
)
def test_pictures_of_any_size(
    stream: Any, tmp_path: Path, shape: tuple[int, ...], size: tuple[int, int], shown: int, more: int
) -> None:
    made = item(tmp_path / "x.safetensors", {"a": torch.zeros(shape, dtype=torch.uint8)})
    _, rows = picture_rows(stream, [made])
    assert len(rows) == shape[0]
    thumbs, others = rows[0].cells[0]
    assert (len(thumbs), others) == (shown, more)
    assert (thumbs[0].width, thumbs[0].height) == size


def test_items_of_several_tensors_and_of_different_length(stream: Any, tmp_path: Path) -> None:
    picture = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    items = [item(tmp_path / "a.safetensors", {"m.one": picture, "m.two": picture.repeat(3, 1, 1, 1)})]
    columns, rows = picture_rows(stream, items)
    assert [c.title for c in columns] == ["x: one", "x: two"]
    assert [[len(thumbs) for thumbs, _ in row.cells] for row in rows] == [[1, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(11, 1, 2, 2).byte()]
)
def test_tensors_that_are_no_pictures(stream: Any, tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"tensor 'a' .* does not hold pictures of 10 classes"):
        picture_rows(stream, [item(tmp_path / "a.safetensors", {"a": tensor})])


def test_kept_pictures_of_patients_are_shown_and_explained_but_raw_ones_are_not(check_page, make_class_run) -> None:
    run = make_class_run(patients=True)
    page = check_page(write_report(run))
    assert "No pictures of test samples" in page
    part = section(page, "pictures")
    assert part.count("<img") == 50
    assert "come from patients" in part
    ledger = json.loads((run / LAST / "ledger.json").read_text())
    for entry in ledger["items"]:
        entry["kind"] = "exemplars" if entry["name"] == "dreamed" else entry["kind"]
    (run / LAST / "ledger.json").write_text(json.dumps(ledger))
    assert section(check_page(write_report(run)), "pictures").count("<img") == 10
    recipe = yaml.safe_load((run / "recipe.yaml").read_text()) | {"report": {"patient_samples": True}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    part = section(check_page(write_report(run)), "pictures")
    assert part.count("<img") == 50
    assert "raw training images" in part


def test_a_ledger_cannot_point_out_of_its_folder(make_class_run) -> None:
    run = make_class_run()
    path = run / LAST / "ledger.json"
    path.write_text(path.read_text().replace("kept/means.safetensors", "kept/../../means.safetensors"))
    with pytest.raises(DataError, match="item 'means' is not in kept/"):
        write_report(run)


def test_distances_by_class(stream: Any, tmp_path: Path) -> None:
    nan = float("nan")
    tensors = {
        "memory.impressions": torch.tensor([[0.5, 0.1, nan], [nan, nan, nan], [0.0, 0.2, 0.4], [0.3, 0.4, 0.5]]),
        "memory.reference": torch.tensor([[0.3, 0.2, 0.4, nan], [0.1, 0.2, nan, nan], [0.0, 0.0, 0.1, 0.2], [nan] * 4]),
    }
    (found,) = memorisation(stream, [item(tmp_path / "d.safetensors", tensors, "distances")])
    rows = found["rows"]
    assert [r.name for r in rows] == ["zero", "one", "two", "three"]
    assert [(r.made, r.real, r.copies) for r in rows] == [(2, 3, 1), (0, 2, 0), (3, 4, 1), (3, 0, 0)]
    values = [(r.made_least, r.made_median, r.real_least, r.real_median, r.ratio_least, r.ratio_median) for r in rows]
    assert values[0] == pytest.approx((0.1, 0.3, 0.2, 0.3, 0.5, 1.0))
    assert values[1] == pytest.approx((None, None, 0.1, 0.15, None, None))
    assert values[2] == pytest.approx((0.0, 0.2, 0.0, 0.05, None, 4.0))
    assert values[3] == pytest.approx((0.3, 0.4, None, None, None, None))
    assert (found["copies"], found["made"], found["twins"]) == (2, 8, ["two"])


@pytest.mark.parametrize(
    "tensors",
    [
        {"impressions": torch.zeros(2, 3)},
        {"impressions": torch.zeros(2, 3), "reference": torch.zeros(3, 3)},
        {"impressions": torch.zeros(11, 3), "reference": torch.zeros(11, 3)},
        {"impressions": torch.zeros(2), "reference": torch.zeros(2)},
    ],
)
def test_tensors_that_are_no_distances(stream: Any, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(DataError, match="does not hold distances of 10 classes"):
        memorisation(stream, [item(tmp_path / "d.safetensors", tensors, "distances")])


@pytest.mark.parametrize("copies", [False, True])
def test_possible_copies_are_marked(check_page, make_class_run, copies: bool) -> None:
    page = check_page(write_report(make_class_run(copies=copies)))
    part = section(page, "memorisation")
    assert ("1 of 225 synthetic images may be a copy" in part) == copies
    assert ("none of 225 synthetic images is marked" in part) != copies
    assert part.count("possible copy</span>") == copies
    assert ("possible copy</text>" in part) == copies
    assert 'id="def-nearest"' in page
    assert 'id="def-possible-copy"' in page


def test_runs_without_distances_do_not_explain_them(check_page, make_class_run) -> None:
    page = check_page(write_report(make_class_run(method="finetune")))
    assert "def-nearest" not in page
    assert 'id="pictures"' not in page


def test_strips_are_inline_the_same_each_time_and_not_endless(page_markup) -> None:
    values = tuple(np.linspace(0.1, 0.9, 5000))
    rows = [Strip("a & <b>", values, (False,) * 5000, values), Strip("none", (), (), (0.3,))]
    svg = strips("x", rows, "distance")
    assert svg == strips("x", rows, "distance")
    assert not page_markup(svg).wrong
    assert "#0a0b" not in svg
    assert svg.count("<use") < 80
    assert strips("y", rows[1:], "distance") == ""


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
        "accuracy.average[of=accuracy,bg=out,absent=skip]",
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
