"""What a run leaves in its log and in trackers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from perdure.data.sampling import Batches
from perdure.engine import run_logger
from perdure.engine.duration import in_words
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.run_logger import RunLogger
from perdure.errors import UsageError


def test_the_log_holds_each_term_and_goes_on_where_it_was(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method, run = toy(), bench(log_every=2)
    run.run(method, [train(method, Batches(view(10), 2))])
    lines = run.lines()
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {"seconds", "task", "phase", "step", "of", "epoch", "run_step", "lr", "loss", "fit"} == set(lines[0])
    assert lines[0]["loss"] == lines[0]["fit"]
    with (run.folder / "log.jsonl").open("a") as log:
        log.write('{"seconds": 99')  # a kill in the middle of a line
    again = bench(log_every=2)
    again.run(method, [train(method, Batches(view(4), 2))], task=1)
    *earlier, last = again.lines()
    assert earlier == lines
    assert (last["task"], last["step"], last["run_step"]) == (2, 2, 7)
    assert last["seconds"] >= lines[-1]["seconds"]


def test_tensorboard_files_hold_the_curves_and_no_name_of_this_machine(
    bench: Any, train: Any, toy: Any, view: Any
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for task in range(2):
        run = bench(trackers=["tensorboard"])
        method = toy()
        run.run(method, [train(method, Batches(view(6), 2))], task)
        run.engine.machine.stop_trackers()
        run.checkpoint.clear()
    files = sorted(p.name for p in (run.folder / "tracking" / "toy").iterdir())
    assert files == ["events.out.tfevents.000000.perdure", "events.out.tfevents.000001.perdure"]
    assert not any(socket.gethostname() in name for name in files)
    shown = EventAccumulator(str(run.folder / "tracking" / "toy")).Reload()
    assert "task1/train/fit" in shown.Tags()["scalars"]
    logged = {line["run_step"]: line["loss"] for line in run.lines() if line["task"] == 2}
    curve = {event.step: event.value for event in shown.Scalars("task2/train/loss")}
    assert sorted(curve) == sorted(logged) == [4, 5, 6]
    assert all(curve[step] == pytest.approx(logged[step]) for step in curve)


def test_a_tracker_that_is_not_installed_is_a_plain_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="names wandb, which is not installed"):
        Machine(EngineOptions(device="cpu", trackers=("wandb",)), tmp_path)


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per minute and one at the end, whole however long, and no bar's control characters."""
    clock = Clock()
    monkeypatch.setattr(run_logger, "time", clock)
    logger = RunLogger(Machine(EngineOptions(device="cpu", trackers=())))
    note = f"loss 0.500 ({', '.join(f'term_{k} 0.1' for k in range(12))})"
    with logger.progress("task 2 · train", 400, 100) as show:
        for step in range(101, 401):
            clock.now += 1
            show(step, note if step % 50 == 0 else None)
    with logger.progress("task 2 · collect", 3) as show:
        for step in range(1, 4):
            show(step)
    logger.say("x" * 300)
    lines = capsys.readouterr().err.splitlines()
    steps = [int(line.split("  ")[1].partition(" ")[0]) for line in lines[:-1]]
    assert steps == [160, 220, 280, 340, 400, 3]
    assert lines[0] == f"task 2 · train  160 of 400  {note}  about 4 min 00 s left"
    assert lines[4].endswith("took 5 min 00 s")
    assert lines[5] == "task 2 · collect  3 of 3  took 0 s"
    assert lines[6] == "x" * 300
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_time_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
