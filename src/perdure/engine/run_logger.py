"""What a run reports while it works: progress bars or lines, and log.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perdure.engine.duration import in_words
from perdure.files import write_failure

if TYPE_CHECKING:
    from perdure.engine.machine import Machine
    from perdure.engine.state import State

_TAIL_BYTES = 1 << 16
EVENTS: Final = frozenset({"sealed", "unlearned", "collected", "generated", "validation"})
"""What a line may say that happened; the audit takes any other for something that does not belong in a log."""
_LINE_SECONDS = 60.0
"""Between two lines about a phase where the output is no terminal: a night's log can still be read."""


class Show(Protocol):
    """Shows how far a phase is."""

    def __call__(self, done: int, note: str | None = None) -> None:
        """Set the number of finished steps and, if given, the note behind it, which stays until the next one."""


class RunLogger:
    """Shows progress and appends one JSON line per interval to ``log.jsonl`` (main process only).

    On a terminal progress is a moving bar; elsewhere it is a line per phase, and one per minute in long ones. Tasks are
    counted from 1 in both.

    Attributes:
        last_step: Last line about training that an earlier process of this run wrote, if any.
    """

    def __init__(self, machine: Machine, path: Path | None = None, quiet: bool = False) -> None:
        self.machine, self.path = machine, path
        self.console = Console(stderr=True, quiet=quiet or not machine.main)
        lines = _earlier_lines(path) if path is not None and machine.main else []
        earlier = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        self._started = time.monotonic() - earlier
        self.last_step = next((line for line in reversed(lines) if "run_step" in line), None)

    def log(self, **values: object) -> None:
        """Append a line with the seconds that the run has worked and the given values.

        Raises:
            PerdureError: The disk is full.
        """
        if self.path is None or not self.machine.main:
            return
        line = json.dumps(
            {"seconds": round(time.monotonic() - self._started, 3), **values}, allow_nan=False, default=str
        )
        try:  # opened for each line, so that every line is there when a process is killed
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            raise write_failure(self.path, error) from error

    def say(self, text: str) -> None:
        """Print one line for people (rich markup); it is not cut where the output is no terminal."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Show]:
        """Progress of a phase: title, steps, time left, latest losses. Gives the function that moves it on."""
        if self.console.quiet or not self.console.is_terminal:
            yield self._lines(title, total, done)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            bar_task = bar.add_task(title, total=total, completed=done, note="")

            def show(done: int, note: str | None = None) -> None:
                bar.update(bar_task, completed=done)
                if note is not None:
                    bar.update(bar_task, note=note)

            yield show

    def _lines(self, title: str, total: int, first: int) -> Show:
        """Progress as plain lines: at most one per minute, and one at the end of the phase."""
        started = said = time.monotonic()
        noted, told = "", first

        def show(done: int, note: str | None = None) -> None:
            nonlocal said, noted, told
            noted, now = note or noted, time.monotonic()
            if done == told or (done < total and now - said < _LINE_SECONDS):
                return
            said, told = now, done
            left = (now - started) * (total - done) / max(1, done - first)
            when = f"took {in_words(now - started)}" if done >= total else f"about {in_words(left)} left"
            parts = (title, f"{done:,} of {total:,}", noted, when)
            self.console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)

        return show


def _earlier_lines(path: Path) -> list[State]:
    """Last lines that earlier processes wrote; a line that a kill cut short is taken off the file."""
    if not path.exists():
        return []
    try:
        with path.open("r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            tail = stream.read()
            whole, cut = tail[: tail.rfind(b"\n") + 1], tail[tail.rfind(b"\n") + 1 :]
            if cut:
                stream.truncate(size - len(cut))
    except OSError as error:
        raise write_failure(path, error) from error
    lines: list[State] = []
    for text in whole.splitlines():
        with contextlib.suppress(ValueError):  # the first one may have lost its beginning
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) else []
    return lines
