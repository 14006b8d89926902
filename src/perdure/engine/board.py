"""TensorBoard event files that do not carry the name of the host, as those of the usual writer do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from perdure.files import write_failure


class Board:
    """Appends scalars to a new event file in ``folder``; a resumed run opens the next file.

    Every call reaches the disk before it returns: there is no thread behind it that a kill could leave with half
    of what was said, and a full disk is met where it happens.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = sum(1 for _ in folder.glob("events.out.tfevents.*"))
            self.path = folder / f"events.out.tfevents.{number:06d}.perdure"
            self._writer = RecordWriter(self.path.open("xb", buffering=0))
        except OSError as error:
            raise write_failure(folder, error) from error
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars of one step. Raises PerdureError where the disk is full."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, event: object) -> None:
        try:
            self._writer.write(event.SerializeToString())  # type: ignore[attr-defined]
        except OSError as error:
            raise write_failure(self.path, error) from error
