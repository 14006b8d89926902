"""Kept items on the page: pictures by class, and distances that would tell a copy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from perdure.errors import DataError
from perdure.files import write_tensors
from perdure.report.kept_items import MOST_STAGES, KeptItem, memorisation, picture_rows, with_stages
from perdure.report.page import write_report
from perdure.report.plots import Strip, strips
from perdure.report.run_data import load_run

LAST = "tasks/03-eight-nine"


def section(page: str, name: str) -> str:
    """One section of a page."""
    return page[page.index(f'<section id="{name}">') :].split("</section>")[0]


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


def item(path: Path, tensors: dict[str, torch.Tensor], shows: str = "images", kind: str = "synthetic") -> KeptItem:
    write_tensors(path, tensors)
    return KeptItem(
        name="x", kind=kind, shows=shows, bytes=1, made_from="made up", file="kept/x.safetensors", path=path
    )


@pytest.fixture
def stream(make_class_run) -> Any:
    return load_run(make_class_run(sealed=0)).stream


def test_synthetic_pictures_of_earlier_tasks_stand_before_those_of_the_last(stream: Any, tmp_path: Path) -> None:
    pictures = {"a": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}
    made, means = item(tmp_path / "x", pictures), item(tmp_path / "y", pictures, kind="statistics")
    spoken = [task.spoken for task in stream.tasks]
    assert with_stages({}, stream) == ()
    assert with_stages({0: (means, made)}, stream) == (means, made)
    names = [one.name for one in with_stages({0: (means, made), 1: (means, made), 2: (made, means)}, stream)]
    assert names == [f"x after {spoken[0]}", f"x after {spoken[1]}", f"x after {spoken[2]}", "x"]
    assert with_stages({0: (means,), 1: (made,)}, stream) == (made,)


def test_of_many_tasks_a_few_are_shown(stream: Any, tmp_path: Path) -> None:
    made = item(tmp_path / "x", {"a": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)})
    many = SimpleNamespace(tasks=[SimpleNamespace(spoken=f"task {k}") for k in range(12)])
    names = [one.name for one in with_stages(dict.fromkeys(range(12), (made,)), many)]  # type: ignore[arg-type]
    assert names == [f"x after task {k}" for k in (0, 3, 6, 9, 11)]
    assert len(names) == MOST_STAGES + 1


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


@pytest.mark.parametrize(
    ("place", "told"), [("../../kept/means", "is not a ledger"), ("means", "item 'means' is not in kept/")]
)
def test_a_ledger_cannot_point_elsewhere(make_class_run, place: str, told: str) -> None:
    run = make_class_run()
    path = run / LAST / "ledger.json"
    path.write_text(path.read_text().replace("kept/means.safetensors", f"{place}.safetensors"))
    with pytest.raises(DataError, match=told):
        write_report(run)


def test_distances_by_class(stream: Any, tmp_path: Path) -> None:
    nan = float("nan")
    tensors = {
        "memory.impressions": torch.tensor([[0.5, 0.1, nan], [nan, nan, nan], [0.0, 0.2, 0.4], [0.3, 0.4, 0.5]]),
        "memory.reference": torch.tensor([[0.3, 0.2, 0.4, nan], [0.1, 0.2, nan, nan], [0.0, 0.0, 0.1, 0.2], [nan] * 4]),
    }
    (found,) = memorisation(stream, [item(tmp_path / "d.safetensors", tensors, "distances")])
    rows = found.rows
    assert [r.name for r in rows] == ["zero", "one", "two", "three"]
    assert [(r.made, r.real, r.copies) for r in rows] == [(2, 3, 1), (0, 2, 0), (3, 4, 1), (3, 0, 0)]
    values = [(r.made_least, r.made_median, r.real_least, r.real_median, *r.ratios) for r in rows]
    assert values[0] == pytest.approx((0.1, 0.3, 0.2, 0.3, 0.5, 1.0))
    assert values[1] == pytest.approx((None, None, 0.1, 0.15, None, None))
    assert values[2] == pytest.approx((0.0, 0.2, 0.0, 0.05, None, 4.0))
    assert values[3] == pytest.approx((0.3, 0.4, None, None, None, None))
    assert (found.copies, found.made, found.twins) == (2, 8, ["two"])


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
