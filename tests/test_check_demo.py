"""The check that follows the demo refuses what it should refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_demo.py"
HEAD = "after_task,task,class_id,class_name,figure,value,n\n"
FIGURE = '"miou.all[bg=in,absent=skip]"'
PAGE = '<html><img src="data:image/png;base64,AA"><a href="https://example.org">paper</a></html>'


def make_demo(folder: Path, star: float = 60.0, finetune: float = 40.0, tasks: int = 4) -> Path:
    """Folder as `perdure demo` leaves it; figures of earlier tasks are 90."""
    for method, last in (("star", star), ("finetune", finetune), ("joint", 55.0)):
        (folder / method).mkdir()
        values = [last] if method == "joint" else [90.0] * (tasks - 1) + [last]
        rows = [f"{t},task,,,{FIGURE},{value},11\n{t},task,1,one,iou,99.0,1\n" for t, value in enumerate(values)]
        (folder / method / "results.csv").write_text(HEAD + "".join(reversed(rows)))
        (folder / method / "report.html").write_text(PAGE)
    (folder / "compare.html").write_text(PAGE)
    return folder


def check(folder: Path) -> tuple[int, str]:
    """Exit code and output of the script."""
    done = subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_good_demo_passes(tmp_path: Path) -> None:
    code, said = check(make_demo(tmp_path, star=55.0))
    assert (code, said) == (
        0,
        "miou.all[bg=in,absent=skip] after the last task: finetune 40.0, star 55.0, joint 55.0\n",
    )


def test_forgetting_fails(tmp_path: Path) -> None:
    code, said = check(make_demo(tmp_path, star=54.9))
    assert code == 1
    assert "star is less than 15 points above finetune" in said


def test_too_few_tasks_fail(tmp_path: Path) -> None:
    code, said = check(make_demo(tmp_path, tasks=3))
    assert code == 1
    assert "star: measured after 3 tasks, not at least 4" in said


@pytest.mark.parametrize("method", ["star", "finetune", "joint"])
def test_missing_results_fail(tmp_path: Path, method: str) -> None:
    (make_demo(tmp_path) / method / "results.csv").unlink()
    code, said = check(tmp_path)
    assert code == 1
    assert f"{method}: no miou.all[bg=in,absent=skip] in results.csv" in said


@pytest.mark.parametrize("page", ["compare.html", "star/report.html"])
@pytest.mark.parametrize(
    "part",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        "<img src='http://example.org/x.png'>",
        '<img src="picture.png">',
        '<link rel="stylesheet" href="//example.org/x.css">',
        "<style>p { background: url(https://example.org/x.png) }</style>",
        "<style>@import 'https://example.org/x.css';</style>",
    ],
)
def test_page_that_fetches_fails(tmp_path: Path, page: str, part: str) -> None:
    (make_demo(tmp_path) / page).write_text(PAGE + part)
    code, said = check(tmp_path)
    assert code == 1
    assert f"{tmp_path / page} fetches " in said


def test_missing_page_fails(tmp_path: Path) -> None:
    (make_demo(tmp_path) / "compare.html").unlink()
    code, said = check(tmp_path)
    assert code == 1
    assert "compare.html is missing or empty" in said
