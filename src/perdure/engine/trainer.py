"""Optimiser, precision, averaging and loss bookkeeping of one Train phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perdure.data.case import Batch
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions, Precision
from perdure.engine.phases import Terms, Train
from perdure.engine.state import State
from perdure.errors import UsageError
from perdure.networks.network import Network


class _Trainee(nn.Module):
    """The trained module and its loss as one module, so that gradient averaging sees every use of it."""

    def __init__(self, phase: Train, autocast: Callable[[], torch.autocast]) -> None:
        super().__init__()
        self.module, self._loss, self._autocast = phase.module, phase.loss, autocast

    def forward(self, batch: Batch) -> Terms:
        with self._autocast():
            return self._loss(batch)


class Trainer:
    """Optimiser, scaler, EMA, precision and loss terms of one Train phase."""

    def __init__(self, phase: Train, machine: Machine, options: EngineOptions) -> None:
        self.phase, self.machine = phase, machine
        self.accumulate = phase.accumulate
        precision: Precision = phase.precision or options.precision
        if precision == "fp16" and options.precision != "fp16":
            raise UsageError(
                f"phase '{phase.name}' computes in fp16, the run in {options.precision}",
                "set engine.precision=fp16, which scales the loss",
            )
        phase.module.train()
        # faster on a GPU and with bf16, slower with fp32 on a CPU; it does not exist for volumes
        flat = not any(isinstance(m, nn.Conv3d) for m in phase.module.modules())
        faster = machine.device.type == "cuda" or precision == "bf16"
        self.channels_last = flat and {"auto": faster, "on": True, "off": False}[options.channels_last]
        if self.channels_last:
            # Not `to(memory_format=…)`, which fails on a method's buffers of five axes. Through `_apply`, as that does,
            # because methods move their frozen copies along there.
            phase.module._apply(_channels_last)  # type: ignore[no-untyped-call]
        self.compiled: list[nn.Module] = []
        if options.compile:
            # parts of a method that are called as modules and have weights; a network says which of its parts are
            children = phase.module.children()
            parts = [part for m in children for part in (m.compilable() if isinstance(m, Network) else [m])]
            lists = (nn.ModuleList, nn.ModuleDict)
            self.compiled = [m for m in parts if any(True for _ in m.parameters()) and not isinstance(m, lists)]
        for part in self.compiled:
            part.compile()
        # listed once, not at every step: that goes through all modules
        self.parameters = [p for p in phase.module.parameters() if p.requires_grad]
        self.trainee = machine.accelerator.prepare(_Trainee(phase, partial(machine.autocast, precision)))
        # not wrapped: accelerate's wrapper searches for an installed package at every step, which slows small networks
        self.optimizer = phase.optimizer()
        # of its own, so that a phase starts the same in a run that went on and in one that was resumed
        self.scaler = torch.amp.GradScaler(machine.device.type) if precision == "fp16" else None
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._sums: Terms = {}  # of the loss terms since the last report
        self._count = 0
        self.ema: AveragedModel | None = None
        if phase.ema is not None:
            # of the parameters alone: buffers may come and go, which the average cannot follow
            self.averaged = nn.ParameterList(phase.module.parameters())
            self.ema = AveragedModel(self.averaged, multi_avg_fn=get_ema_multi_avg_fn(phase.ema))  # type: ignore[no-untyped-call]

    def step(self, reads: Iterator[Batch | None], step: int, total: int) -> Terms:
        """One optimiser step on ``accumulate`` batches; returns the detached loss terms, averaged over them."""
        sums: Terms = {}
        for turn in range(1, self.accumulate + 1):
            batch = next(reads)
            if batch is not None:
                batch = batch.to(self.machine.device)
                if self.channels_last:
                    batch = batch._replace(images=_channels_last(batch.images))
            # processes average their gradients once per step, after the last batch
            with nullcontext() if turn == self.accumulate else self.machine.accelerator.no_sync(self.trainee):
                terms: Terms = self.trainee(batch)
                if self.accumulate > 1:
                    terms = {k: v / self.accumulate for k, v in terms.items()}
                loss = reduce(torch.add, terms.values())
                torch.autograd.backward(self.scaler.scale(loss) if self.scaler else loss)
            add_sums(sums, {k: v.detach() for k, v in terms.items()})
        add_sums(self._sums, sums)
        self._count += 1
        factor = self.phase.schedule(step, total)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        if self.phase.clip is not None:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.phase.clip)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.averaged)
        return sums

    def nonfinite(self, weights: bool = True) -> str | None:
        """What is NaN or infinite in any process, in words: a loss term since the last report, or a trained weight.

        Weights show what the loss shows one step too late; going through them takes longer. Makes the sums of the
        terms means over processes.
        """
        if self.machine.world > 1 and self._sums:
            names = sorted(self._sums)
            mean = self.machine.total(torch.stack([self._sums[name].float() for name in names])) / self.machine.world
            self._sums = dict(zip(names, mean, strict=True))
        for name, value in self._sums.items():
            if not torch.isfinite(value).all():
                return f"the loss term '{name}'"
        if weights and not all(torch.stack([p.detach().isfinite().all() for p in self.parameters]).tolist()):
            return "a weight"
        return None

    def means(self) -> dict[str, float]:
        """Mean of each loss term since the last call; only now are the terms read from the device."""
        means = {name: float(value) / self._count for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state(self) -> State:
        """What :meth:`resume` needs."""
        state: State = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        if self.ema is not None:
            state["ema"] = dict(self.ema.state_dict())
        return state

    def resume(self, inside: State) -> None:
        """Restore the optimiser, the scaler and the average of a phase under way."""
        state = inside.get("trainer")
        if state is None:  # the phase begins
            return
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def close(self) -> None:
        """Put the averaged weights in place, let go of the optimiser, and leave the module as one read from disk.

        What follows then computes the same, bit by bit, in a run that went on and in one that was picked up here.
        """
        if self.ema is not None:
            averaged = self.ema.module.parameters()
            with torch.no_grad():
                for parameter, mean in zip(self.phase.module.parameters(), averaged, strict=True):
                    parameter.copy_(mean)
        if self.machine.world > 1:  # each process has counted running statistics of its own batches
            from accelerate.utils import broadcast

            broadcast([b for b in self.phase.module.buffers() if b.numel()])
        for part in self.compiled:
            part._compiled_call_impl = None
        if self.channels_last:
            # also the strides of axes of length one, which choose the algorithm as well
            with torch.no_grad():
                for tensor in (*self.phase.module.parameters(), *self.phase.module.buffers()):
                    tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        self.machine.accelerator.free_memory()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def add_sums(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add named tensors to running sums."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
