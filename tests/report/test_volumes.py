"""The pages of a run of volumes from several data sets, and what the audit makes of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.metrics.changes import read_changes
from perdure.report.page import write_model_card, write_report
from perdure.run_folder import RunFolder


@pytest.fixture
def run(volume_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(volume_run, tmp_path / "run"))


def test_the_report_shows_slices_changes_and_a_curve_per_task(run: Path, check_page: Callable[[Path], str]) -> None:
    page = check_page(write_report(run))
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert {"Over the stream", "What each task changed", "The same test samples after each task"} <= set(headings)
    assert "<h3>Each task&#39;s structures after every task</h3>" in page
    shown = re.findall(r"<h3>test image ([\w-]+)</h3>", page)
    assert {"organs-00000-mid", "vessels-00000-mid"} <= set(shown) and len(shown) <= 6
    found = read_changes(run, RunFolder(run).stream(), 1)
    assert found is not None
    section = page[page.index('<section id="changes">') :].partition("</section>")[0]
    rows = re.findall(r'scope="row">(\w+)</th>(.*?)</tr>', section)
    assert [name for name, _ in rows] == ["liver", "spleen", "kidneys"]
    for (_, cells), change in zip(rows, found.classes, strict=True):
        numbers = re.findall(r"<td[^>]*>(.*?)</td>", cells)
        assert numbers[0] == f"{change.before:.1f}" and numbers[-1] == f"{change.agreement:.1f}"
    assert f"{found.changed:.2f} % of the voxels of the task" in section
    assert "windows of 16 × 16 × 16 voxels, at 12 × 10 × 10 mm" in page


def test_the_model_card_names_the_data_set_of_each_task(run: Path) -> None:
    card = write_model_card(run).read_text()
    rows = [line for line in card.splitlines() if re.match(r"\| [12] \| (organs|vessels) \|", line)][:2]
    assert [row.split(" | ")[2] for row in rows] == [
        "phantoms (kind torso, set organs, size 32, train 2, test 2)",
        "phantoms (kind torso, set vessels, size 32, train 2, test 2)",
    ]
    assert "liver, spleen, kidneys" in rows[0]
    assert [row.split(" | ")[6] for row in rows] == ["2", "2"], "test volumes of each task's own set"


def test_what_is_gone_is_said(run: Path, rewrite: Callable[[Path], None], check_page: Callable[[Path], str]) -> None:
    """As if the first set had been deleted before the second came."""
    import json

    counts = run / "tasks/01-vessels/counts.json"
    told = json.loads(counts.read_text())
    del told["sets"]["organs"]
    counts.write_text(json.dumps(told))
    (run / "tasks/01-vessels/cases.csv").unlink()
    card, page = write_model_card(run).read_text(), check_page(write_report(run))
    assert (
        "- After task vessels: the test cases of task 'organs' are not at hand, so figures that need them are left"
        in card
    )
    assert "The test images of earlier tasks were not at hand." in page


def test_the_audit_passes_and_finds_a_page_that_was_changed(run: Path, cli: Callable[..., Any]) -> None:
    done = cli("audit", run)
    assert done.code == 0, done.out
    page = run / "report.html"
    page.write_text(page.read_text().replace("What each task changed", "What no task changed"))
    done = cli("audit", run)
    assert done.code == 1 and "report.html" in done.out


def test_pictures_are_counted_by_volume(run: Path) -> None:
    names = {p.name.partition(".")[0] for p in (run / "tasks/01-vessels/samples").iterdir()}
    assert names >= {f"{part}-0000{k}-mid" for part in ("organs", "vessels") for k in (0, 1)}
    card = (run / "MODEL_CARD.md").read_text()
    assert "| pictures | preview |" in card and "4 test images, " in card
