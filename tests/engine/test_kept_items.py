"""Items of Generate phases that a method keeps: in the run's store, by name in checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.engine.phases import Generate
from perdure.errors import DataError, Interrupted, RunError
from perdure.files import read_tensors, write_tensors
from perdure.kept import store as room
from perdure.kept.store import FileStore


def noise(index: int, progress: Any) -> dict[str, Tensor]:
    return {"x": torch.rand(2)}


@pytest.fixture
def method(toy: Any, tmp_path: Path) -> Any:
    """A method with a store in the run's folder."""

    def make() -> Any:
        made = toy()
        made.store = FileStore(tmp_path / "kept", tmp_path / "resume" / "kept.jsonl")
        return made

    return make


def test_kept_items_are_named_and_outlive_the_task(bench: Any, method: Any, tmp_path: Path) -> None:
    taken: list[Path] = []
    learner, run = method(), bench()
    learner.files["dreams"] = ("earlier",)
    scratch = Generate("scratch", learner, 2, noise, taken.extend)
    run.run(learner, [scratch, Generate("dream big", learner, 3, noise, keep="dreams")], task=4)
    names = tuple(f"04-01-dream-big/00000{i}.safetensors" for i in range(3))
    assert learner.files == {"dreams": ("earlier", *names)}
    assert all(path.is_relative_to(tmp_path / "resume" / "items") for path in taken)
    resumed = method()
    assert run.checkpoint.load(resumed, 4).phase == 2
    assert resumed.files == learner.files
    run.checkpoint.clear()
    assert not taken[0].exists()
    found = [read_tensors(path)["x"] for path in learner.store.paths(names)]
    assert len({tuple(x.tolist()) for x in found}) == 3


def test_finish_may_choose(bench: Any, method: Any) -> None:
    learner = method()

    def finish(paths: list[Path]) -> None:
        assert paths == learner.store.paths(learner.files["dreams"])
        learner.files["dreams"] = learner.files["dreams"][::2]

    bench().run(learner, [Generate("dream", learner, 3, noise, finish, keep="dreams")])
    assert learner.files["dreams"] == tuple(f"00-00-dream/00000{i}.safetensors" for i in (0, 2))


def test_a_stopped_phase_goes_on_with_the_next_item_and_ends_the_same(
    bench: Any, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def make(index: int, progress: Any) -> dict[str, Tensor]:
        made.append(index)
        return noise(index, progress)

    def go(stop: bool) -> Any:
        learner, run = method(), bench()
        if stop:
            run.checkpoint.due = lambda step, stopping: (step == 1, step == 1)
        run.run(learner, [Generate("dream", learner, 4, make, keep="dreams")])
        return learner

    with pytest.raises(Interrupted):
        go(stop=True)
    stopped = go(stop=False)
    assert made == [0, 1, 2, 3]
    first = [path.read_bytes() for path in stopped.store.paths(stopped.files["dreams"])]
    shutil.rmtree(tmp_path / "kept")
    shutil.rmtree(tmp_path / "resume")
    whole = go(stop=False)
    assert whole.files == stopped.files
    assert [path.read_bytes() for path in whole.store.paths(whole.files["dreams"])] == first


def test_a_save_holds_the_names_of_2000_files_and_reads_none(
    bench: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)  # speed only
    learner, run = method(), bench()
    run.run(learner, [])
    run.run(learner, [Generate("few", learner, 1, noise)])
    before = run.state.stat().st_size
    run.checkpoint.clear()
    run.run(learner, [Generate("dream", learner, 2000, noise, keep="dreams")])
    names = sum(len(name) + 6 for name in learner.files["dreams"])  # two escaped quotes, a comma and a space
    assert run.state.stat().st_size < before + names + 100

    def refuse(*paths: Any, **options: Any) -> Any:
        raise AssertionError(f"read {paths}")

    monkeypatch.setattr(room, "sha256", refuse)
    shutil.rmtree(learner.store.root)
    run.checkpoint.save(learner, 0, run.checkpoint.load(learner, 0))  # needs no file


def test_items_without_a_run_folder_are_refused(bench: Any, toy: Any) -> None:
    learner = toy()
    with pytest.raises(RunError, match="needs a run folder"):
        bench().run(learner, [Generate("dream", learner, 1, noise, keep="dreams")])


def _stopped(bench: Any, method: Any) -> None:
    """Make the first two of three items, and stop."""
    run = bench()
    run.checkpoint.due = lambda step, stopping: (step == 2, step == 2)
    with pytest.raises(Interrupted):
        run.run(method(), [Generate("dream", method(), 3, noise, keep="dreams")])


def test_an_item_that_was_changed_meanwhile_is_not_trained_on(bench: Any, method: Any, tmp_path: Path) -> None:
    _stopped(bench, method)
    write_tensors(tmp_path / "kept/00-00-dream/000000.safetensors", {"x": torch.zeros(2)})
    learner, run = method(), bench()
    with pytest.raises(DataError, match="is not as the run wrote it"):
        run.checkpoint.load(learner, 0)
    with pytest.raises(DataError, match="is not as the run wrote it"):
        bench().run(learner, [Generate("dream", learner, 3, noise, keep="dreams")])


def test_an_item_that_nobody_noted_is_made_again(bench: Any, method: Any, tmp_path: Path) -> None:
    """As after a kill between the file and its note; or it was planted."""
    path = tmp_path / "kept/00-00-dream/000000.safetensors"
    _stopped(bench, method)
    first = path.read_bytes()
    write_tensors(path, {"x": torch.zeros(2)})
    (tmp_path / "resume/kept.jsonl").write_text('{"name": "cut sho')
    learner = method()
    bench().run(learner, [Generate("dream", learner, 3, noise, keep="dreams")])
    assert path.read_bytes() == first


def test_progress_says_what_items_show(bench: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, run, titles = method(), bench(), list[str]()
    logger, shown = run.engine.logger, run.engine.logger.progress
    monkeypatch.setattr(logger, "progress", lambda title, *rest: (titles.append(title), shown(title, *rest))[1])
    run.run(learner, [Generate("dream", learner, 1, noise, of="[hearts]"), Generate("few", learner, 1, noise)])
    assert titles == ["task 1 · dream of [hearts]", "task 1 · few"]
