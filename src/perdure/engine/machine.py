"""Devices, precision and processes, through accelerate."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
            raise UsageError(
                "engine.device=cuda, but no GPU can be used here", "use engine.device=auto or cpu"
            )
        on_cpu = options.device == "cpu" or not torch.cuda.is_available()
        if options.precision == "fp16" and on_cpu:
            raise UsageError("engine.precision=fp16 is unusable on a CPU", "use bf16 or fp32")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        trackers = _trackers(options) if trackers_at is not None else []
        self.options = options
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="fp16" if options.precision == "fp16" else "no",
            log_with=trackers or None,
            project_dir=str(trackers_at) if trackers else None,
        )
        self.has_trackers = bool(trackers)
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

    def start_trackers(self, name: str) -> None:
        """Open the trackers under a run name."""
        if self.has_trackers:
            self.accelerator.init_trackers(name)

    def stop_trackers(self) -> None:
        """Close the trackers."""
        if self.has_trackers:
            self.accelerator.end_training()

    def autocast(self, precision: Precision) -> AbstractContextManager[Any]:
        """Autocast for a precision; fp32 switches an outer autocast off."""
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
            raise UsageError(
                f"engine.trackers names {absent[0]}, which is not installed", f"pip install {absent[0]}"
            )
        return list(options.trackers)
    silent = os.environ.get("PERDURE_NO_TRACKER")
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") and not silent else []
