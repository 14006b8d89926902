"""Runs in forked children that announce what they do, and are killed at a chosen moment. For tests of this folder."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perdure.engine.checkpoint import Checkpoint
from perdure.engine.trainer import Trainer
from perdure.errors import PerdureError

LEFT_OUT = ("log.jsonl", ".lock", "files.json")  # which lists the hash of the log and its times
TIMES = re.compile(
    rb' All tasks together took [^<.]*\.|(?<=<td class="n time">)[^<]*|(?<= \| )[^|\n]*(?= \| (?:done|to do) \|)'
)

Say = Callable[[str], None]


def child(work: Callable[[], None]) -> tuple[int, str]:
    """Run in a forked process; returns minus the signal or the exit code (0, 1 PerdureError, 9 a bug), and a text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, text = 9, ""
        try:
            gc.freeze()  # accelerate collects garbage after each phase: leave the parent's out of it
            os.fsync = lambda handle: None  # a kill does not lose what the kernel has; speed only
            work()
            code = 0
        except PerdureError as error:
            code, text = 1, f"{type(error).__name__}: {error}"
        except BaseException:  # noqa: BLE001
            text = traceback.format_exc()
        finally:
            os.write(writer, text.encode()[:60_000])
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status != 9, text
    return status, text


def announce(say: Say) -> None:
    """Make this process say what it does. Only ever called in a child."""
    step, save, replace, rmtree = Trainer.step, Checkpoint.save, Path.replace, shutil.rmtree

    def told_step(self: Trainer, reads: Any, number: int, total: int) -> Any:
        terms = step(self, reads, number, total)
        say(f"step {number + 1}")
        return terms

    def told_save(self: Checkpoint, method: Any, task: int, position: Any) -> None:
        say(f"save {task}.{position.phase}.{position.step}")
        save(self, method, task, position)
        say(f"saved {task}.{position.phase}.{position.step}")

    def told_replace(self: Path, target: Path) -> Path:
        name = "/".join(Path(target).parts[-2:])
        say(f"replace {name} {self}")
        result = replace(self, target)
        say(f"replaced {name}")
        return result

    def told_rmtree(path: Path, **options: Any) -> None:
        say(f"rmtree {Path(path).name}")
        rmtree(path, **options)

    Trainer.step, Checkpoint.save, Path.replace, shutil.rmtree = told_step, told_save, told_replace, told_rmtree


def at(moment: str, number: int, act: Callable[[str], None]) -> Say:
    """Do something when ``moment`` is announced for the ``number``-th time."""
    count = 0

    def say(text: str) -> None:
        nonlocal count
        if text == moment or text.startswith(moment + " "):
            count += 1
            if count == number:
                act(text)

    return say


def kill(text: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halve_and_kill(text: str) -> None:
    """As if the kill came while the temporary file was being written."""
    part = Path(text.split()[-1])
    os.truncate(part, part.stat().st_size // 2)
    kill(text)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run but the log and what trackers wrote, and without the times that pages show."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    kept = {k: p.read_bytes() for k, p in files.items() if k not in LEFT_OUT and not k.startswith("tracking/")}
    return {k: TIMES.sub(b"", v) if k in ("report.html", "MODEL_CARD.md") else v for k, v in kept.items()}


def assert_same(folder: Path, reference: dict[str, bytes]) -> None:
    got = content(folder)
    assert sorted(got) == sorted(reference)
    assert [name for name in got if got[name] != reference[name]] == []
