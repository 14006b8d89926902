"""Devices, precision and processes, through accelerate."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perdure.engine.board import Board
from perdure.engine.options import EngineOptions
from perdure.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Machine:
    """The processes and the device of this run.

    Args:
        options: The run's engine options.
        trackers_at: Folder for trackers that write files, or ``None`` for no trackers.

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
        trackers = _trackers(options) if trackers_at is not None else []
        # TensorBoard has a writer of its own here, for accelerate's puts the host's name into the file's
        self._board_at = trackers_at if "tensorboard" in trackers else None
        self._board: Board | None = None
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

    @property
    def device(self) -> torch.device:
        """Where tensors of this process live."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        """Number of this process, 0 is the main one."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """True in the process that writes files."""
        return bool(self.accelerator.is_main_process)

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

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers: each has counted running statistics of its own batches."""
        if self.world > 1:
            from accelerate.utils import broadcast

            broadcast([b for b in module.buffers() if b.numel()])

    def start_trackers(self, name: str) -> None:
        """Open the trackers under a run name."""
        if self._board_at is not None and self.main:
            self._board = Board(self._board_at / name)
        if self.accelerator.log_with:
            self.accelerator.init_trackers(name)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars to the trackers."""
        if self._board is not None:
            self._board.log(values, step)
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)

    def stop_trackers(self) -> None:
        """Close the trackers."""
        if self._board is not None:
            self._board.close()
            self._board = None
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        """Autocast for a precision; fp32 switches an outer autocast off."""
        if precision == "fp16" and self.device.type == "cpu":
            raise UsageError("precision fp16 is unusable on a CPU", "use bf16 or fp32")
        enabled = precision != "fp32"
        return torch.autocast(self.device.type, dtype=_DTYPES.get(precision, torch.bfloat16), enabled=enabled)

    def channels_last(self, module: nn.Module, precision: Precision) -> bool:
        """Whether 2D networks should run channels-last."""
        if any(isinstance(m, nn.Conv3d) for m in module.modules()):
            return False
        if self.options.channels_last == "auto":
            return self.device.type == "cuda" or precision == "bf16"
        return self.options.channels_last == "on"


def _trackers(options: EngineOptions) -> list[str]:
    if options.trackers is not None:
        absent = [t for t in options.trackers if importlib.util.find_spec(t) is None]
        if absent:
            raise UsageError(f"engine.trackers names {absent[0]}, which is not installed", f"pip install {absent[0]}")
        return list(options.trackers)
    silent = os.environ.get("PERDURE_NO_TRACKER")
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") and not silent else []
