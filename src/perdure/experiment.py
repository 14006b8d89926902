"""The story of a run: stream -> tasks -> phases -> kept -> results -> report."""

from __future__ import annotations

from pathlib import Path

from perdure.config.build import Experiment, as_module, build_experiment
from perdure.config.recipe import Recipe
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.journal import Journal
from perdure.engine.machine import Machine
from perdure.report.model_card import write_model_card
from perdure.report.page import write_report
from perdure.run_folder import RunFolder
from perdure.sealing import begin, measure_monitor, restore_sealed, seal
from perdure.streams.summary import describe

SPARE_BYTES = 50_000_000


def run_experiment(recipe: Recipe, out: Path, resume: bool = False, quiet: bool = False) -> RunFolder:
    """Run a recipe into the folder ``out``, or go on with the run that is there.

    Raises:
        PerdureError: Whatever keeps the run from starting or going on, in plain words; the folder stays resumable.
    """
    run = RunFolder(out)
    experiment = build_experiment(recipe)
    described = describe(experiment.stream, recipe.data.name, experiment.source.patients)
    machine = Machine(recipe.engine, trackers_at=out / "tracking")
    if not machine.main:
        machine.barrier()
        return _learn(experiment, run, machine, quiet=True)
    with run.locked():
        run.start(recipe, described, resume)
        run.space_for(_bytes_needed(experiment))
        machine.barrier()  # the other processes may look at the folder from here on
        return _learn(experiment, run, machine, quiet)


def _learn(experiment: Experiment, run: RunFolder, machine: Machine, quiet: bool) -> RunFolder:
    recipe, stream, method = experiment.recipe, experiment.stream, experiment.method
    journal = Journal(machine, run.path / "log.jsonl", quiet)
    checkpoint = Checkpoint(run.resume, machine, recipe.engine.save_seconds)
    engine = Engine(machine, recipe.engine, recipe.seed, checkpoint, journal)
    module = as_module(method)
    sealed = run.sealed()
    restore_sealed(method, stream.tasks, sealed, recipe.seed)
    machine.start_trackers(recipe.name.replace("/", "-"))
    for task in stream.tasks[len(sealed) :]:
        with stream.opened(task):  # training data of every other task is out of reach from here on
            begin(method, task, recipe.seed)
            position = checkpoint.load(module, task.index)
            module.to(machine.device)
            monitor = measure_monitor(experiment, task, machine)
            engine.run(module, method.phases(task), task.index, position, monitor)
        seal(experiment, task, run, machine, journal)
        checkpoint.clear()
    machine.stop_trackers()
    if machine.main:
        write_model_card(run.path)
        write_report(run.path)
    return run


def _bytes_needed(experiment: Experiment) -> int:
    """Rough size of a run: the network for every task, and a resume state with optimiser and a spare copy."""
    network = sum(t.nbytes for t in as_module(experiment.method).state_dict().values())
    return network * (len(experiment.stream) + 8) + SPARE_BYTES
