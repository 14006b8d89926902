"""The one loop for every phase kind of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from perdure.data.views import Batch
from perdure.engine.checkpoint import Checkpoint, Position
from perdure.engine.interrupt import Interrupted, StopSignal
from perdure.engine.journal import Advance, Journal
from perdure.engine.loader import Draws, make_loader
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Collect, Generate, Phase, Train
from perdure.engine.trainer import Trainer, Window, add_sums
from perdure.errors import PerdureError, UsageError
from perdure.files import write_tensors
from perdure.seeds import fold

Monitor = Callable[[], Mapping[str, float]]


class Engine:
    """Runs phases, shows progress, logs, saves and resumes.

    Args:
        machine: Devices and processes.
        options: Engine options of the recipe.
        seed: The run's seed.
        checkpoint: Where to save.
        journal: Where to report.
    """

    def __init__(
        self, machine: Machine, options: EngineOptions, seed: int, checkpoint: Checkpoint, journal: Journal
    ) -> None:
        self.machine, self.options, self.seed = machine, options, seed
        self.checkpoint, self.journal = checkpoint, journal
        self._track_step = 0

    def run(
        self,
        method: nn.Module,
        phases: Sequence[Phase],
        task: int,
        position: Position,
        monitor: Monitor | None = None,
    ) -> None:
        """Run a task's phases from ``position`` on.

        Raises:
            Interrupted: A stop was asked for; the state has been saved.
            PerdureError: A loss is not finite, or the disk is full.
        """
        method.to(self.machine.device)
        with StopSignal() as stop:
            for number, phase in enumerate(phases):
                if number < position.phase:
                    continue
                here = position if number == position.phase else Position(number)
                work = _Work(self, method, task, number, phase, stop)
                match phase:
                    case Train():
                        self._train(phase, here, work, monitor)
                    case Collect():
                        self._collect(phase, here, work)
                    case Generate():
                        self._generate(phase, here, work)
                self.checkpoint.save(method, task, Position(number + 1))
                work.leave_if_asked()

    def _train(self, phase: Train, here: Position, work: _Work, monitor: Monitor | None) -> None:
        trainer = Trainer(phase, self.machine, self.options)
        trainer.resume(here.inside)
        batches = phase.data() if phase.data is not None else None
        per_epoch = batches.steps() if batches is not None else 1
        total = _length(phase, per_epoch, trainer.accumulate)
        reads: Iterator[Batch | None] = repeat(None)
        if batches is not None:
            micro = trainer.accumulate
            draws = Draws(
                batches, work.seed, here.step * micro, total * micro, self.machine.rank, self.machine.world
            )
            reads = iter(
                make_loader(draws, self.options.workers, self.machine.device.type == "cuda", work.seed)
            )
        window = Window()
        with self.journal.progress(work.title, total, here.step) as bar:
            for step in range(here.step, total):
                torch.manual_seed(fold(work.seed, "step", step, self.machine.rank))
                window.add(trainer.step(reads, step, total))
                if phase.after_step is not None:
                    phase.after_step(step)
                last = step + 1 == total
                if last or (step + 1) % self.options.log_every == 0:
                    self._report(work, step, total, per_epoch, window, trainer.lr, bar)
                if monitor is not None and self._monitor_due(step + 1, per_epoch):
                    self._monitor(work, step, monitor, phase.module)
                if not last:
                    work.save_if_due(step, lambda: {"trainer": trainer.state()}, window)
        trainer.close()
        if phase.finish is not None:
            phase.finish()

    def _collect(self, phase: Collect, here: Position, work: _Work) -> None:
        batches = phase.data()
        total = batches.steps()
        sums: dict[str, Tensor] = {}
        if self.machine.main:  # what was saved is the sum over all processes
            sums = {k: v.to(self.machine.device) for k, v in here.inside.get("sums", {}).items()}
        draws = Draws(batches, work.seed, here.step, total, self.machine.rank, self.machine.world)
        reads = make_loader(draws, self.options.workers, self.machine.device.type == "cuda", work.seed)
        was_training = phase.module.training
        phase.module.eval()
        with (
            self.journal.progress(work.title, total, here.step) as bar,
            torch.no_grad(),
            self.machine.autocast("fp32"),
        ):
            for step, batch in enumerate(reads, here.step):
                torch.manual_seed(fold(work.seed, "step", step, self.machine.rank))
                if batch is not None:
                    add_sums(sums, phase.measure(batch.to(self.machine.device)))
                bar.to(step + 1)
                if step + 1 < total:
                    work.save_if_due(step, lambda: {"sums": self._share_sums(sums)})
        totals = self._share_sums(sums)
        if self.machine.world > 1:
            totals = _broadcast(totals)
        phase.module.train(was_training)
        phase.finish(totals)
        self.journal.log(task=work.task, phase=phase.name, event="collected", steps=total)

    def _share_sums(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move all partial sums to the main process and return them."""
        if self.machine.world == 1:
            return sums
        from accelerate.utils import gather_object

        parts = gather_object([{k: v.cpu() for k, v in sums.items()}])
        sums.clear()
        if self.machine.main:
            for part in parts:
                add_sums(sums, {k: v.to(self.machine.device) for k, v in part.items()})
        return sums

    def _generate(self, phase: Generate, here: Position, work: _Work) -> None:
        folder = self.checkpoint.items(f"{work.number:02d}-{phase.name}")
        paths = [folder / f"{i:06d}.safetensors" for i in range(phase.count)]
        phase.module.eval()
        with self.journal.progress(work.title, phase.count, here.step) as bar:
            for index in range(self.machine.rank, phase.count, self.machine.world):
                if not paths[index].exists():  # items are written in one step, so one that exists is whole
                    torch.manual_seed(fold(work.seed, "item", index))
                    write_tensors(paths[index], phase.make(index))
                bar.to(index + 1)
                if self.machine.world == 1:
                    work.save_if_due(index, dict)
        self.machine.barrier()
        phase.finish(paths)

    def _report(
        self, work: _Work, step: int, total: int, per_epoch: int, window: Window, lr: float, bar: Advance
    ) -> None:
        work.refuse_nonfinite(window, step)
        terms = window.means()
        loss = sum(terms.values())
        bar.to(step + 1, f"loss {loss:.3f}")
        self.journal.log(
            task=work.task,
            phase=work.phase.name,
            step=step + 1,
            of=total,
            epoch=(step + 1) / per_epoch,
            lr=lr,
            loss=loss,
            **terms,
        )
        self._track_step += 1
        self.journal.track(
            {f"task{work.task}/{k}": v for k, v in {"loss": loss, "lr": lr, **terms}.items()},
            self._track_step,
        )

    def _monitor_due(self, steps_done: int, per_epoch: int) -> bool:
        every = self.options.monitor_every * per_epoch
        return every > 0 and steps_done % every == 0

    def _monitor(self, work: _Work, step: int, monitor: Monitor, module: nn.Module) -> None:
        figures = monitor()
        module.train()
        self.journal.log(task=work.task, phase=work.phase.name, step=step + 1, event="monitor", **figures)
        self.journal.track({f"task{work.task}/monitor/{k}": v for k, v in figures.items()}, self._track_step)


class _Work:
    """One phase of one task of one method: its seed, its place in the checkpoint, its title."""

    def __init__(
        self, engine: Engine, method: nn.Module, task: int, number: int, phase: Phase, stop: StopSignal
    ) -> None:
        self.engine, self.method, self.task, self.number, self.phase, self.stop = (
            engine,
            method,
            task,
            number,
            phase,
            stop,
        )
        self.seed = fold(engine.seed, "task", task, "phase", number, phase.name)
        self.title = f"task {task + 1} · {phase.name}"

    def save_if_due(
        self, step: int, inside: Callable[[], dict[str, object]], window: Window | None = None
    ) -> None:
        """Save after ``step`` if it is time or a stop was asked for; then stop if it was."""
        save, leave = self.engine.checkpoint.due(step, self.stop.asked)
        if save or leave:
            if window is not None:
                self.refuse_nonfinite(window, step)
            position = Position(self.number, step + 1, dict(inside()))
            self.engine.checkpoint.save(self.method, self.task, position)
        if leave:
            self._leave()

    def refuse_nonfinite(self, window: Window, step: int) -> None:
        """Raise a plain error if a loss term is NaN or infinite, before anything of it is saved."""
        name = window.nonfinite()
        if name is not None:
            raise PerdureError(
                f"the loss term '{name}' is not finite: task {self.task + 1}, phase '{self.phase.name}', step {step + 1}",
                "try a lower training.lr, training.clip=1 or engine.precision=fp32; --resume starts from the last save",
            )

    def leave_if_asked(self) -> None:
        """Stop between two phases if a stop was asked for."""
        if self.engine.machine.any(self.stop.asked):
            self._leave()

    def _leave(self) -> None:
        self.engine.machine.barrier()
        raise Interrupted(
            f"stopped in task {self.task + 1}, phase '{self.phase.name}'; everything so far is saved",
            "the same command with --resume goes on from here",
        )


def _broadcast(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    from accelerate.utils import broadcast_object_list

    box = [totals]
    broadcast_object_list(box)
    return box[0]


def _length(phase: Train, per_epoch: int, accumulate: int) -> int:
    if (phase.epochs is None) == (phase.steps is None):
        raise UsageError(f"phase '{phase.name}' needs either epochs or steps")
    if phase.steps is not None:
        return phase.steps
    return max(1, (phase.epochs or 0) * per_epoch // accumulate)
