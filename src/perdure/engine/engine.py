"""The one loop for every phase kind of every method."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from types import FrameType
from typing import Final, NoReturn

import torch
from torch import Tensor

from perdure.data.case import Batch, collate
from perdure.data.sampling import Batches, BatchSampler, Mix, check_shares
from perdure.engine.checkpoint import Checkpoint, Position
from perdure.engine.loader import read_draws
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Collect, Generate, Phase, Train
from perdure.engine.run_logger import RunLogger, Show
from perdure.engine.state import State, Stateful
from perdure.engine.trainer import Trainer, add_sums
from perdure.errors import Interrupted, PerdureError, RunError, UsageError
from perdure.kept.store import item_names
from perdure.seeds import derive_seed, manual_seed

GO_ON: Final = "the same command goes on from here"
"""What to do after a stop; the command line says that `perdure run` needs an option for it."""

Validate = Callable[[], Mapping[str, float]]


class StopSignal:
    """Whether SIGTERM or Ctrl-C arrived while :meth:`listen` was open; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listen(self) -> Iterator[StopSignal]:
        """Replace the handlers of SIGTERM and SIGINT; only the main thread may do so, others are never asked."""
        with ExitStack() as previous:
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):
                    previous.callback(signal.signal, number, signal.signal(number, self._ask))
            yield self

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@dataclass(frozen=True)
class _Work:
    """The phase under way: whose it is, its seed, the names of the finished phases, and whether to stop.

    Plain data: what is done with it stands in :class:`Engine`.
    """

    method: Stateful
    task: int
    number: int
    name: str
    seed: int
    done: list[str]
    stop: StopSignal
    title: str


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
        with StopSignal().listen() as stop:
            number = -1
            for number, phase in enumerate(phases):
                if number < position.phase:
                    if position.done[number] != phase.name:
                        was, now = position.done[number], phase.name
                        raise RunError(
                            f"phase {number + 1} of the task was '{was}', but the method now asks for '{now}'",
                            "decisions between phases must follow from buffers that later phases leave alone",
                        )
                    continue
                method.eval()  # whatever mode the previous phase left; the trainer sets train mode where it is needed
                here = position if number == position.phase else Position(number)
                seed = derive_seed(self.seed, "task", task, "phase", number, phase.name)
                title = f"task {task + 1} · {phase.name}"
                work = _Work(method, task, number, phase.name, seed, position.done, stop, title)
                match phase:
                    case Train():
                        self._train(phase, here, work, validation)
                    case Collect():
                        self._collect(phase, here, work)
                    case Generate():
                        self._generate(phase, here, work)
                position.done.append(phase.name)
                self.checkpoint.save(method, task, Position(number + 1, done=position.done))
                if self.machine.any(stop.asked):
                    self._leave(work)
            if number + 1 < position.phase:
                raise RunError(
                    f"phase '{position.done[number + 1]}' of the task is done, but the method no longer asks for it",
                    "decisions between phases must follow from buffers that later phases leave alone",
                )

    def _train(self, phase: Train, here: Position, work: _Work, validation: Validate | None) -> None:
        trainer = Trainer(phase, self.machine, self.options)
        trainer.resume(here.inside)
        batches = phase.data() if phase.data is not None else None
        per_epoch = batches.steps() if batches is not None else 1
        share = trainer.accumulate / per_epoch  # epochs per optimiser step
        total = phase.steps
        if (phase.epochs is None) == (total is None):
            raise UsageError(f"phase '{phase.name}' needs either epochs or steps")
        if total is None:
            total = max(1, (phase.epochs or 0) * per_epoch // trainer.accumulate)
        reads: Iterator[Batch | None] = repeat(None)
        if batches is not None:
            check_shares(batches, self.machine.world)
            reads = self._reads(batches, here.step * trainer.accumulate, total * trainer.accumulate, work.seed)
        before, every = self._steps_before(work), self.options.validate_every
        with self.logger.progress(work.title, total, here.step) as show:
            for step in range(here.step, total):
                # a seed per step, so that a resumed run needs no generator state and draws the same
                manual_seed(derive_seed(work.seed, "step", step, self.machine.rank))
                trainer.step(reads, step, total)
                if phase.after_step is not None:
                    phase.after_step(step)
                done, note = step + 1, None
                epoch = done * trainer.accumulate / per_epoch  # not a sum of shares: whole epochs are whole numbers
                if done == total or done % self.options.log_every == 0:
                    place = {"step": done, "of": total, "epoch": epoch, "run_step": before + done}
                    note = self._report(work, place, trainer)
                show(done, note)
                if validation is not None and every and int(epoch / every + 1e-9) > int((epoch - share) / every + 1e-9):
                    figures = validation()
                    phase.module.train()
                    self.logger.log(task=work.task + 1, phase=phase.name, step=done, event="validation", **figures)
                    self._track(work, figures, before + done)
                if done < total:
                    self.save_if_due(work, done, lambda: {"trainer": trainer.state()}, trainer.nonfinite)
        self._refuse_nonfinite(work, total, trainer.nonfinite())
        trainer.close()
        self._steps = before + total
        if phase.finish is not None:
            phase.finish()

    def _collect(self, phase: Collect, here: Position, work: _Work) -> None:
        batches, device = phase.data(), self.machine.device
        total, sums = batches.steps(), dict[str, Tensor]()
        if self.machine.main:  # what was saved is the sum over all processes
            sums = {k: v.to(device) for k, v in here.inside.get("sums", {}).items()}
        reads = self._reads(batches, here.step, total, work.seed)
        phase.module.eval()
        with (
            self.logger.progress(work.title, total, here.step) as show,
            torch.no_grad(),
            self.machine.autocast("fp32"),
        ):
            for done, batch in enumerate(reads, here.step + 1):
                manual_seed(derive_seed(work.seed, "step", done - 1, self.machine.rank))
                if batch is not None:  # with several processes, the last batch may be too small for all of them
                    add_sums(sums, phase.measure(batch.to(device)))
                show(done)
                if done < total:
                    self.save_if_due(work, done, lambda: {"sums": self._move_to_main(sums)})
        self._move_to_main(sums)
        if self.machine.world > 1:
            from accelerate.utils import broadcast_object_list

            # objects, because the others do not know names and shapes of the sums
            box: list[dict[str, Tensor]] = [{k: v.cpu() for k, v in sums.items()}]
            broadcast_object_list(box)
            sums = {k: v.to(device) for k, v in box[0].items()}
        phase.finish(sums)
        self.logger.log(task=work.task + 1, phase=phase.name, event="collected", steps=total)

    def _generate(self, phase: Generate, here: Position, work: _Work) -> None:
        store = self.checkpoint.scratch if phase.keep is None else work.method.store
        names = item_names(work.task, work.number, phase.name, phase.count)
        rank, world = self.machine.rank, self.machine.world
        rounds = -(-phase.count // world)
        phase.module.eval()
        title = work.title if phase.of is None else f"{work.title} of {phase.of}"
        with self.logger.progress(title, phase.count, here.step * world) as show:
            for turn in range(rounds):
                index = turn * world + rank
                if index < phase.count and not store.whole(names[index]):
                    manual_seed(derive_seed(work.seed, "item", index))
                    saved = here.inside.get("item") if turn == here.step and world == 1 else None
                    store.write(names[index], phase.make(index, _ItemProgress(saved, self, work, turn, show)))
                show(min(phase.count, (turn + 1) * world))
                if turn + 1 < rounds:
                    self.save_if_due(work, turn + 1, dict)
        self.machine.barrier()  # until the other processes have written the items that `finish` reads
        if phase.keep is not None:
            work.method.files[phase.keep] = (*work.method.files.get(phase.keep, ()), *names)
        if phase.finish is not None:
            phase.finish(store.paths(names))
        self.logger.log(task=work.task + 1, phase=phase.name, event="generated", items=phase.count)

    def save_if_due(
        self, work: _Work, done: int, inside: Callable[[], State], nonfinite: Callable[[], str | None] | None = None
    ) -> None:
        """Save when it is time or a stop was asked for; then stop if it was.

        Args:
            work: The phase under way.
            done: Steps that are done.
            inside: What the phase needs to continue after them.
            nonfinite: Names what must not be saved because it is not finite.
        """
        save, leave = self.checkpoint.due(done, work.stop.asked)
        if save or leave:
            if nonfinite is not None:
                self._refuse_nonfinite(work, done, nonfinite())
            self.checkpoint.save(work.method, work.task, Position(work.number, done, inside(), work.done))
        if leave:
            self._leave(work)

    def _leave(self, work: _Work) -> NoReturn:
        self.machine.barrier()  # until the main process has saved
        raise Interrupted(
            f"stopped in task {work.task + 1}, phase '{work.name}'; everything so far is saved",
            GO_ON,
        )

    def _refuse_nonfinite(self, work: _Work, step: int, name: str | None) -> None:
        """Raise a plain error if something is NaN or infinite, before anything of it is saved."""
        if name is not None:
            raise PerdureError(
                f"{name} is not finite: task {work.task + 1}, phase '{work.name}', step {step}",
                "start a new run with a lower training.lr, training.clip=1 or engine.precision=fp32",
            )

    def _report(self, work: _Work, place: Mapping[str, float], trainer: Trainer) -> str:
        """Log and track the mean terms since the last report; return them in words."""
        self._refuse_nonfinite(work, int(place["step"]), trainer.nonfinite(weights=False))
        terms, lr = trainer.means(), float(trainer.optimizer.param_groups[0]["lr"])
        loss = sum(terms.values())
        self.logger.log(task=work.task + 1, phase=work.name, **place, lr=lr, loss=loss, **terms)
        self._track(work, {"loss": loss, "lr": lr, **terms}, int(place["run_step"]))
        parts = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        return f"loss {loss:.3f}" + (f" ({parts})" if len(terms) > 1 else "")

    def _track(self, work: _Work, figures: Mapping[str, float], run_step: int) -> None:
        self.machine.track({f"task{work.task + 1}/{work.name}/{k}": v for k, v in figures.items()}, run_step)

    def _steps_before(self, work: _Work) -> int:
        """Optimiser steps of the run before this phase; the log knows them where an earlier process did them."""
        if self._steps is None:
            line = self.logger.last_step or {"run_step": 0, "step": 0}
            here = (line.get("task"), line.get("phase")) == (work.task + 1, work.name)
            self._steps = int(line["run_step"]) - (int(line["step"]) if here else 0)
        return self._steps

    def _reads(self, batches: Batches | Mix, start: int, stop: int, seed: int) -> Iterator[Batch | None]:
        """This process's batches of the steps ``start .. stop - 1``."""
        draws = BatchSampler(batches, seed, start, stop, self.machine.rank, self.machine.world)
        return read_draws(draws, collate, self.options.workers, self.machine.device.type == "cuda", seed)

    def _move_to_main(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add up the partial sums of all processes in the main one, in place; the others start again from nothing."""
        if self.machine.world > 1:
            from accelerate.utils import gather_object

            parts = gather_object([{k: v.cpu() for k, v in sums.items()}])
            sums.clear()
            for part in parts if self.machine.main else ():
                add_sums(sums, {k: v.to(self.machine.device) for k, v in part.items()})
        return sums


@dataclass
class _ItemProgress:
    """See :class:`~perdure.engine.phases.Progress`."""

    saved: State | None
    engine: Engine
    work: _Work
    turn: int
    show: Show

    def checkpoint(self, done: int, of: int, note: str, state: Callable[[], dict[str, object]]) -> None:
        self.show(self.turn, f"{done} of {of} {note}")
        if self.engine.machine.world == 1:  # processes work on different items: there is no common moment to save
            self.engine.save_if_due(self.work, self.turn, lambda: {"item": state()})
