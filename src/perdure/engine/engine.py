"""The one loop for every phase kind of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.data.sampling import Batches, BatchSampler, Mix, check_shares
from perdure.engine.checkpoint import Checkpoint, Position
from perdure.engine.interrupt import Interrupted, StopSignal
from perdure.engine.loader import make_loader
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Collect, Generate, Phase, Train
from perdure.engine.run_logger import RunLogger
from perdure.engine.state import Stateful
from perdure.engine.trainer import Trainer, Window, add_sums
from perdure.errors import PerdureError, UsageError
from perdure.kept.store import item_names
from perdure.seeds import derive_seed, manual_seed

Validate = Callable[[], Mapping[str, float]]


class Engine:
    """Runs phases, shows progress, logs, saves and resumes.

    Args:
        machine: Devices and processes.
        options: Engine options of the recipe.
        seed: The run's seed.
        checkpoint: Where to save.
        logger: Where to report.
    """

    def __init__(
        self, machine: Machine, options: EngineOptions, seed: int, checkpoint: Checkpoint, logger: RunLogger
    ) -> None:
        self.machine, self.options, self.seed = machine, options, seed
        self.checkpoint, self.logger = checkpoint, logger
        self._steps: int | None = None  # optimiser steps of the run's finished phases, once known

    def run(
        self,
        method: Stateful,
        phases: Iterable[Phase],
        task: int,
        position: Position,
        validation: Validate | None = None,
    ) -> None:
        """Run a task's phases from ``position`` on.

        ``phases`` may be decided as the task goes on. A resumed run goes through the decisions before ``position``
        again; they have to be the same ones.

        Raises:
            RunError: The method, asked again, decides for other phases than those that are done.
            Interrupted: A stop was asked for; the state has been saved.
            PerdureError: A loss is not finite, or the disk is full.
        """
        method.to(self.machine.device)
        with StopSignal() as stop:
            for number, phase in enumerate(phases):
                if number < position.phase:
                    position.refuse_other(number, phase.name)
                    continue
                method.eval()  # whatever ran before; a training phase wakes what it trains
                here = position if number == position.phase else Position(number, done=position.done)
                work = _Work(self, method, task, number, phase, stop, position.done)
                match phase:
                    case Train():
                        self._train(phase, here, work, validation)
                    case Collect():
                        self._collect(phase, here, work)
                    case Generate():
                        self._generate(phase, here, work)
                position.done.append(phase.name)
                self.checkpoint.save(method, task, Position(number + 1, done=position.done))
                work.leave_if_asked()

    def _train(self, phase: Train, here: Position, work: _Work, validation: Validate | None) -> None:
        trainer = Trainer(phase, self.machine, self.options)
        trainer.resume(here.inside)
        batches = phase.data() if phase.data is not None else None
        per_epoch = batches.steps() if batches is not None else 1
        total = _length(phase, per_epoch, trainer.accumulate)
        if batches is not None:
            check_shares(batches, self.machine.world)
        reads = self._reads(batches, here.step * trainer.accumulate, total * trainer.accumulate, work.seed)
        before = self._steps_before(work)
        window = Window()
        with self.logger.progress(work.title, total, here.step) as bar:
            for step in range(here.step, total):
                manual_seed(derive_seed(work.seed, "step", step, self.machine.rank))
                window.add(trainer.step(reads, step, total))
                if phase.after_step is not None:
                    phase.after_step(step)
                done, last = step + 1, step + 1 == total
                epoch = done * trainer.accumulate / per_epoch
                if last or done % self.options.log_every == 0:
                    place = {"step": done, "of": total, "epoch": epoch, "run_step": before + done, "lr": trainer.lr}
                    bar.to(done, f"loss {self._report(work, place, window):.3f}")
                else:
                    bar.to(done)
                if validation is not None and self._validation_due(epoch, trainer.accumulate / per_epoch):
                    self._validate(work, done, before + done, validation, phase.module)
                if not last:
                    work.save_if_due(step, lambda: {"trainer": trainer.state()}, partial(_check, window, trainer))
        work.refuse_nonfinite(total - 1, trainer.nonfinite())
        trainer.close()
        self._steps = before + total
        if phase.finish is not None:
            phase.finish()

    def _reads(self, batches: Batches | Mix | None, start: int, stop: int, seed: int) -> Iterator[Batch | None]:
        """This process's batches of the steps ``start .. stop - 1``; ``None`` for ever where a phase has no data."""
        if batches is None:
            return repeat(None)
        draws = BatchSampler(batches, seed, start, stop, self.machine.rank, self.machine.world)
        return iter(make_loader(draws, self.options.workers, self.machine.device.type == "cuda", seed))

    def _steps_before(self, work: _Work) -> int:
        """Optimiser steps of the run before this phase; the log knows them where an earlier process did them."""
        if self._steps is None:
            line = self.logger.last_step or {"run_step": 0, "step": 0}
            here = (line.get("task"), line.get("phase")) == (work.task, work.phase.name)
            self._steps = int(line["run_step"]) - (int(line["step"]) if here else 0)
        return self._steps

    def _collect(self, phase: Collect, here: Position, work: _Work) -> None:
        batches = phase.data()
        total = batches.steps()
        sums: dict[str, Tensor] = {}
        if self.machine.main:  # what was saved is the sum over all processes
            sums = {k: v.to(self.machine.device) for k, v in here.inside.get("sums", {}).items()}
        reads = self._reads(batches, here.step, total, work.seed)
        phase.module.eval()
        with (
            self.logger.progress(work.title, total, here.step) as bar,
            torch.no_grad(),
            self.machine.autocast("fp32"),
        ):
            for step, batch in enumerate(reads, here.step):
                manual_seed(derive_seed(work.seed, "step", step, self.machine.rank))
                if batch is not None:
                    add_sums(sums, phase.measure(batch.to(self.machine.device)))
                bar.to(step + 1)
                if step + 1 < total:
                    work.save_if_due(step, lambda: {"sums": self._share_sums(sums)})
        totals = self._share_sums(sums)
        if self.machine.world > 1:
            totals = {k: v.to(self.machine.device) for k, v in _broadcast(totals).items()}
        phase.finish(totals)
        self.logger.log(task=work.task, phase=phase.name, event="collected", steps=total)

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
        store = self.checkpoint.scratch if phase.keep is None else work.method.store
        names = item_names(work.task, work.number, phase.name, phase.count)
        rank, world = self.machine.rank, self.machine.world
        rounds = -(-phase.count // world)
        phase.module.eval()
        with self.logger.progress(work.title, phase.count, here.step * world) as bar:
            for turn in range(rounds):
                index = turn * world + rank
                if index < phase.count and not store.path(names[index]).exists():  # one that exists is whole
                    manual_seed(derive_seed(work.seed, "item", index))
                    saved = here.inside if turn == here.step and world == 1 else {}
                    progress = _ItemProgress(work, turn, saved.get("item"), partial(bar.to, turn))
                    store.write(names[index], phase.make(index, progress))
                bar.to(min(phase.count, (turn + 1) * world))
                if turn + 1 < rounds:
                    work.save_if_due(turn, dict)
        self.machine.barrier()
        if phase.keep is not None:
            work.method.files[phase.keep] = (*work.method.files.get(phase.keep, ()), *names)
        if phase.finish is not None:
            phase.finish(store.paths(names))
        self.logger.log(task=work.task, phase=phase.name, event="generated", items=phase.count)

    def _report(self, work: _Work, place: Mapping[str, float], window: Window) -> float:
        """Log and track the mean terms since the last report; returns their sum."""
        work.refuse_nonfinite(int(place["step"]) - 1, window.nonfinite(self.machine))
        terms = window.means()
        loss = sum(terms.values())
        self.logger.log(task=work.task, phase=work.phase.name, **place, loss=loss, **terms)
        figures = {"loss": loss, "lr": place["lr"], **terms}
        self.logger.track({f"{work.tag}/{k}": v for k, v in figures.items()}, int(place["run_step"]))
        return loss

    def _validation_due(self, epoch: float, share: float) -> bool:
        """Whether the step of ``share`` epochs that ends at ``epoch`` crossed a multiple of ``validate_every``."""
        every = self.options.validate_every
        return every > 0 and int(epoch / every + 1e-9) > int((epoch - share) / every + 1e-9)

    def _validate(self, work: _Work, step: int, run_step: int, validation: Validate, module: nn.Module) -> None:
        figures = validation()
        module.train()
        self.logger.log(task=work.task, phase=work.phase.name, step=step, event="validation", **figures)
        self.logger.track({f"{work.tag}/{k}": v for k, v in figures.items()}, run_step)


class _ItemProgress:
    """See :class:`~perdure.engine.phases.Progress`."""

    def __init__(self, work: _Work, turn: int, saved: Mapping[str, Any] | None, note: Callable[[str], None]) -> None:
        self.saved = saved
        self._work, self._turn, self._note = work, turn, note

    def checkpoint(self, done: int, of: int, note: str, state: Callable[[], dict[str, object]]) -> None:
        self._note(f"{done} of {of} {note}")
        if self._work.engine.machine.world == 1:  # processes work on different items: there is no common moment
            self._work.save_inside(self._turn, lambda: {"item": state()})


class _Work:
    """One phase of one task of one method: its seed, its place in the checkpoint, its title."""

    def __init__(
        self,
        engine: Engine,
        method: Stateful,
        task: int,
        number: int,
        phase: Phase,
        stop: StopSignal,
        done: list[str],
    ) -> None:
        self.engine, self.method, self.task = engine, method, task
        self.number, self.phase, self.stop, self.done = number, phase, stop, done
        self.seed = derive_seed(engine.seed, "task", task, "phase", number, phase.name)
        self.title = f"task {task + 1} · {phase.name}"
        self.tag = f"task{task}/{phase.name}"

    def save_if_due(
        self, step: int, inside: Callable[[], dict[str, object]], sound: Callable[[Machine], str | None] | None = None
    ) -> None:
        """Save after ``step`` if it is time or a stop was asked for; then stop if it was.

        Args:
            step: Number of the step that was done, from 0.
            inside: What the phase needs to go on after it.
            sound: Names what must not be saved because it is not finite.
        """
        save, leave = self.engine.checkpoint.due(step, self.stop.asked)
        if save or leave:
            if sound is not None:
                self.refuse_nonfinite(step, sound(self.engine.machine))
            self._save(step + 1, inside)
        if leave:
            self._leave()

    def save_inside(self, step: int, inside: Callable[[], dict[str, object]]) -> None:
        """As :meth:`save_if_due`, in the middle of a step that is then not done yet."""
        save, leave = self.engine.checkpoint.due(step, self.stop.asked)
        if save or leave:
            self._save(step, inside)
        if leave:
            self._leave()

    def _save(self, step: int, inside: Callable[[], dict[str, object]]) -> None:
        self.engine.checkpoint.save(self.method, self.task, Position(self.number, step, dict(inside()), self.done))

    def refuse_nonfinite(self, step: int, name: str | None) -> None:
        """Raise a plain error if something is NaN or infinite, before anything of it is saved."""
        if name is not None:
            raise PerdureError(
                f"{name} is not finite: task {self.task + 1}, phase '{self.phase.name}', step {step + 1}",
                "start a new run with a lower training.lr, training.clip=1 or engine.precision=fp32",
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


def _check(window: Window, trainer: Trainer, machine: Machine) -> str | None:
    return window.nonfinite(machine) or trainer.nonfinite()


def _broadcast(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    from accelerate.utils import broadcast_object_list

    box = [{k: v.cpu() for k, v in totals.items()}]
    broadcast_object_list(box)
    return box[0]


def _length(phase: Train, per_epoch: int, accumulate: int) -> int:
    if (phase.epochs is None) == (phase.steps is None):
        raise UsageError(f"phase '{phase.name}' needs either epochs or steps")
    if phase.steps is not None:
        return phase.steps
    return max(1, (phase.epochs or 0) * per_epoch // accumulate)
