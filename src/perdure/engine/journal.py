"""What a run says while it works: progress bars, log.jsonl and trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from perdure.engine.machine import Machine


class Journal:
    """Shows progress on a terminal and appends one JSON line an interval to ``log.jsonl`` (main process only)."""

    def __init__(self, machine: Machine, path: Path | None = None, quiet: bool = False) -> None:
        self.machine, self.path = machine, path
        self.console = Console(stderr=True, quiet=quiet or not machine.main)
        self._bar: Progress | None = None
        self._started = time.monotonic()

    def log(self, **values: Any) -> None:
        """Append a line with the seconds since the start and the given values."""
        if self.path is None or not self.machine.main:
            return
        line = json.dumps(
            {"seconds": round(time.monotonic() - self._started, 3), **values}, allow_nan=False, default=str
        )
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars to the trackers."""
        if self.machine.has_trackers:
            self.machine.accelerator.log(dict(values), step=step)

    def say(self, text: str) -> None:
        """Print one line for people (rich markup)."""
        (self._bar.console if self._bar else self.console).print(text, highlight=False)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Advance]:
        """Progress bar of a phase: title, steps, time left, latest loss."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=self.console.quiet) as bar:
            self._bar = bar
            try:
                yield Advance(bar, bar.add_task(title, total=total, completed=done, note=""))
            finally:
                self._bar = None


class Advance:
    """Moves one progress bar."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def to(self, done: int, note: str | None = None) -> None:
        """Set the number of finished steps and, if given, the note behind the bar."""
        if note is None:
            self._bar.update(self._task, completed=done)
        else:
            self._bar.update(self._task, completed=done, note=note)
