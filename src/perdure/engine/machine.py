"""Devices, precision, processes and trackers, through accelerate."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from perdure.engine.options import EngineOptions, Precision
from perdure.errors import UsageError
from perdure.files import write_failure


class Machine:
    """The processes and the device of this run.

    Args:
        options: The run's engine options.
        trackers_at: Folder for trackers that write files, or ``None`` for no trackers.

    Attributes:
        device: Where this process computes.
        rank: Number of this process, 0 is the main one.
        world: Number of processes.
        main: True in the process that writes files.

    Raises:
        UsageError: A GPU was asked for and there is none, or fp16 on a CPU (hundreds of times slower there).
    """

    def __init__(self, options: EngineOptions, trackers_at: Path | None = None) -> None:
        from accelerate import Accelerator

        if options.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("engine.device=cuda, but no GPU can be used here", "use engine.device=auto or cpu")
        on_cpu = options.device == "cpu" or not torch.cuda.is_available()
        if options.precision == "fp16" and on_cpu:
            raise UsageError("engine.precision=fp16 is unusable on a CPU", "use bf16 or fp32")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        trackers: list[str] = []
        if trackers_at is not None and options.trackers is not None:
            trackers = list(options.trackers)
            if absent := [name for name in trackers if importlib.util.find_spec(name) is None]:
                raise UsageError(
                    f"engine.trackers names {absent[0]}, which is not installed", f"pip install {absent[0]}"
                )
        elif trackers_at is not None and not os.environ.get("PERDURE_NO_TRACKER"):
            trackers = [name for name in ("tensorboard",) if importlib.util.find_spec(name)]
        self._events_at = trackers_at if "tensorboard" in trackers else None
        self._events: EventFile | None = None
        elsewhere = [name for name in trackers if name != "tensorboard"]
        self.options = options
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="fp16" if options.precision == "fp16" else "no",
            log_with=elsewhere or None,
            project_dir=str(trackers_at) if elsewhere else None,
        )
        if on_cpu:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # filling fresh memory costs time and changes nothing here
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.main = bool(self.accelerator.is_main_process)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.world == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value, "sum")
        return summed

    def any(self, flag: bool) -> bool:
        """True in every process if true in one."""
        if self.world == 1:
            return flag
        return bool(self.total(torch.tensor([int(flag)], device=self.device)).item())

    def start_trackers(self, name: str) -> None:
        """Open the trackers under a run name."""
        if self._events_at is not None and self.main:
            self._events = EventFile(self._events_at / name)
        if self.accelerator.log_with:
            self.accelerator.init_trackers(name)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars to the trackers."""
        if self._events is not None:
            self._events.log(values, step)
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)

    def stop_trackers(self) -> None:
        """Close the trackers."""
        if self._events is not None:
            self._events.close()
            self._events = None
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def autocast(self, precision: Precision) -> torch.autocast:
        """Autocast for a precision; fp32 switches an outer autocast off."""
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=precision != "fp32")


class EventFile:
    """TensorBoard scalars in a new event file in ``folder``; a resumed run opens the next file.

    Torch's and accelerate's writers put the name of the host into the name of the file, which a run folder must not
    hold, and write from a thread. Here every call reaches the disk before it returns: a kill leaves whole records, and
    a full disk is reported where it happens.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        try:
            folder.mkdir(parents=True, exist_ok=True)
            number = sum(1 for _ in folder.glob("events.out.tfevents.*"))
            self.path = folder / f"events.out.tfevents.{number:06d}.perdure"
            self._writer = RecordWriter(self.path.open("xb", buffering=0))
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        except OSError as error:
            raise write_failure(folder, error) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars of one step. Raises PerdureError where the disk is full."""
        summary = self._summary(value=[{"tag": tag, "simple_value": value} for tag, value in values.items()])
        try:
            self._writer.write(self._event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
        except OSError as error:
            raise write_failure(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
