"""Working files of a run: where they lie, who is told of them, and that they are gone when a task is sealed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.engine.trainer import Trainer
from perdure.errors import RunError
from perdure.streams.task import Task
from perdure.working import WorkingFolder

TINY = [
    "network.widths=[4,8]",
    "volumes.spacing=[12,10,10]",
    "volumes.patch=[16,16,16]",
    "training.steps=2",
    "training.later_steps=2",
    "training.batch_size=1",
    "engine.device=cpu",
    "engine.threads=1",
    "engine.trackers=[]",
    "report.samples=0",
]


def task(index: int, name: str) -> Task:
    return Task(index, name, (index + 1,), tuple(range(1, index + 1)), frozenset({index + 1}))


def test_a_folder_of_the_users_choice_gets_one_inside_that_tells_nothing(tmp_path: Path) -> None:
    inside = WorkingFolder(tmp_path / "run", None)
    assert inside.path == tmp_path / "run" / "working"
    chosen = WorkingFolder(tmp_path / "run", tmp_path / "fast")
    assert chosen.path.parent == tmp_path / "fast" and "run" not in chosen.path.name
    # two runs that share it stay apart, and one that goes on finds its own again
    assert WorkingFolder(tmp_path / "other", tmp_path / "fast").path != chosen.path
    assert WorkingFolder(tmp_path / "x" / ".." / "run", tmp_path / "fast").path == chosen.path


def test_clearing_deletes_all_tasks_but_those_that_go_on(tmp_path: Path) -> None:
    folder = WorkingFolder(tmp_path / "run", tmp_path / "fast")
    (tmp_path / "fast").mkdir()
    Path(tmp_path, "fast", "of the user.txt").write_text("stays")
    folder.clear()  # nothing there yet
    tasks = [task(0, "organs"), task(1, "vessels")]
    for one in tasks:
        folder.of(one).mkdir(parents=True)
        Path(folder.of(one), "00000.image.b2nd").write_bytes(b"x")
    folder.clear(besides=tasks[1:])
    assert not folder.of(tasks[0]).exists() and folder.of(tasks[1]).is_dir()
    folder.clear()
    assert [file.name for file in Path(tmp_path, "fast").iterdir()] == ["of the user.txt"]


def test_files_that_cannot_be_deleted_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WorkingFolder(tmp_path, None)
    folder.of(task(0, "organs")).mkdir(parents=True)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refused)
    with pytest.raises(RunError) as told:
        folder.clear()
    assert "cannot be deleted: Permission denied" in told.value.what
    assert told.value.hint == "they hold images: delete the folder by hand"


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Call it with True: from then on training stops at the first step; with False: it goes on."""
    step = Trainer.step

    def stop(*_: Any) -> None:
        raise RunError("stopped here", "go on with --resume")

    def choose(wanted: bool) -> None:
        monkeypatch.setattr(Trainer, "step", stop if wanted else step)

    return choose


@pytest.mark.e2e
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the run folder", "in a folder of the user"])
def test_working_files_are_told_while_they_are_there_and_gone_afterwards(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., Any],
    stopped: Callable[[bool], None],
    elsewhere: bool,
) -> None:
    """A raw folder of nnU-Net counts as one of patients: the audit fails while images lie in the run folder."""
    pytest.importorskip("nnunetv2")
    monkeypatch.chdir(tmp_path)
    assert cli("phantoms", "torso", "d", "--train", 2, "--test", 1, "--size", 32).code == 0
    more = ["engine.working=fast"] if elsewhere else []
    words = ["data-sets/torso", "--data", "d/Dataset001_Organs", "--out", "run", "--quiet", *TINY, *more]
    stopped(True)
    found = cli("run", *words)
    assert found.code == 1 and "stopped here" in found.err
    place = next(Path("fast").iterdir()) if elsewhere else Path("run/working")
    held = [file for file in place.rglob("*") if file.is_file()]
    assert sum(file.name.endswith(".image.b2nd") for file in held) == 2
    if elsewhere:  # an empty file says that there are some, and not where
        (mark,) = (file for file in Path("run/working").rglob("*") if file.is_file())
        assert (mark.name, mark.stat().st_size) == ("elsewhere", 0)
    assert not any("organs_" in str(file.relative_to(place)) for file in held)

    audited = cli("audit", "run")
    assert audited.code == 1
    where = "working files in the folder that engine.working named" if elsewhere else f"{len(held)} working files"
    assert f"{where} hold images of patients; they are deleted" in " ".join(audited.out.split())
    if elsewhere:
        assert "1 working file" not in audited.out
        assert "mark of working files in another folder" in audited.out

    stopped(False)
    done = cli("run", *words, "--resume")
    assert done.code == 0, done.err
    assert not place.exists() and not Path("run/working").exists()
    assert cli("audit", "run").code == 0
    assert not Path("fast").exists() or not any(Path("fast").iterdir())
