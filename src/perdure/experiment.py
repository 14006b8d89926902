"""The sequence of a run: stream -> tasks -> phases -> kept -> results -> report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from perdure.adding import give_up
from perdure.before import Before, told_by_name
from perdure.config.build import Experiment, build_experiment, build_method
from perdure.config.data_sets import in_order
from perdure.config.load import data_of_tasks
from perdure.config.recipe import DataSetsSection, Recipe
from perdure.data.catalog import DATASETS, needs_folder
from perdure.data.gone import GoneSource
from perdure.data.survey import Survey, survey, told
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import GO_ON, Engine
from perdure.engine.machine import Machine
from perdure.engine.run_logger import RunLogger
from perdure.errors import DataError, UsageError, stoppable
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.measured import class_values
from perdure.networks.layers import sync_batch_norm
from perdure.networks.network import Network
from perdure.run_folder import Origin, RunFolder
from perdure.sealing import (
    begin,
    measure_validation,
    publish,
    record,
    refuse_empty_tasks,
    refuse_pictures_of_few,
    restore_sealed,
    seal,
)
from perdure.streams.description import describe, tests_fingerprint, told_of_repeats
from perdure.streams.task import Task
from perdure.working import WorkingFolder

SPARE_BYTES = 50_000_000
"""Room for logs, results and pictures."""


def run_experiment(recipe: Recipe, out: Path, resume: bool = False, quiet: bool = False) -> RunFolder:
    """Run a recipe into the folder ``out``, or continue the run in it.

    Args:
        recipe: What to run.
        out: The run folder.
        resume: Whether a run in ``out`` is continued; without it, one is an error.
        quiet: Print no progress.

    Raises:
        PerdureError: The run cannot start or continue. The folder stays resumable.
    """
    with stoppable("the run was made ready", GO_ON):
        _run(recipe, RunFolder(out), resume, quiet)
    return RunFolder(out)


def _run(recipe: Recipe, run: RunFolder, resume: bool, quiet: bool) -> None:
    recipe = in_order(recipe)
    machine = Machine(recipe.engine, trackers_at=run.path / "tracking")
    there = resume and run.recipe_file.exists()
    with run.read_alone():
        experiment = build_experiment(recipe, len(run.sealed()) if there else 0, known=run.stream() if there else None)
    stream, method = experiment.stream, experiment.method
    with _prepared(run, experiment, machine, resume, quiet):
        logger = RunLogger(machine, run.path / "log.jsonl", quiet)
        checkpoint = Checkpoint(run.resume, machine, recipe.engine.save_seconds)
        engine = Engine(machine, recipe.engine, recipe.seed, checkpoint, logger)
        sealed = run.sealed()
        logger.say(f"[bold]{escape(recipe.name)}[/] · {escape(f'{recipe.method.name} -> {run.path}')}")
        for note in (*experiment.notes, *told_of_repeats(run.stream(), len(sealed))):
            logger.say(f"[yellow]note[/] {escape(note)}")
        restore_sealed(method, stream.tasks, run, sealed, recipe.seed)
        remaining = stream.tasks[len(sealed) :]
        working = WorkingFolder(run.path, recipe.engine.working)
        working.clear(besides=remaining[:1])  # of a task that was killed right after it had been sealed
        if machine.main and sealed and remaining:  # the description has grown, and results and pages follow from it
            record(run)
            publish(run)
        for task in remaining:
            with stream.opened(task):  # training data of all other tasks is sealed in this block
                working.begin(task, machine)
                before = Before.of(experiment, task, working.of(task))
                where = f"of task {task.index + 1} ('{task.name}')"
                if before is not None:
                    with stoppable(f"the model was measured on the new data {where}", GO_ON):
                        _say_how_it_was(experiment, task, before.take(machine), logger)
                        before.look_back(_earlier_models(experiment, run, task), machine)
                with stoppable(f"the model was measured on classes {where} that it has not learned", GO_ON):
                    named = told_by_name(experiment, task, machine)
                with stoppable(f"cases {where} were prepared; those that are ready stay", GO_ON):
                    working.fill(task, machine, quiet)
                begin(method, task, recipe.seed)
                sync_batch_norm(method, machine.device)  # here, because a method may build a network for the task
                position = checkpoint.load(method, task.index)
                method.to(machine.device)
                validation = measure_validation(experiment, task, machine)
                if task is remaining[0]:  # not earlier: data that is refused leaves no file of a tracker behind
                    machine.start_trackers(recipe.name.replace("/", "-"))
                with stoppable(f"classes {where} were learned, before that was saved", GO_ON):
                    engine.run(method, method.phases(task), task.index, position, validation)
            with stoppable(f"the test cases after task {task.index + 1} ('{task.name}') were measured", GO_ON):
                seal(experiment, task, run, machine, logger, before, named)
            checkpoint.clear()
            working.clear()
        machine.stop_trackers()
        checkpoint.clear()  # left over if the run was killed right after the last task was sealed
        if machine.main and not remaining:  # nothing was learned, but the pages may be of an earlier version
            record(run)
            publish(run)


def _earlier_models(experiment: Experiment, run: RunFolder, task: Task) -> Iterator[Method[Options]]:
    """The untrained model, then the one after each sealed task but that before ``task``; one at a time."""
    recipe, tasks = experiment.recipe, experiment.stream.tasks
    for learned in range(task.index):
        method = build_method(recipe, tasks[0].preparation, pretrained=False)
        if learned:
            restore_sealed(method, tasks, run, run.sealed()[:learned], recipe.seed)
        else:
            begin(method, tasks[0], recipe.seed)
        yield method


def _say_how_it_was(experiment: Experiment, task: Task, counts: ConfusionMatrix, logger: RunLogger) -> None:
    """Say how good the model is on a new data set before it learns from it, where that labels an earlier class."""
    dice = class_values("dice", counts)
    known = [(c, value) for c in task.old if c in task.annotated and (value := dice[c].value) is not None]
    if known:
        text = ", ".join(f"{experiment.stream.space.name(c)} {value:.1f}" for c, value in known)
        logger.say(f"[bold]{escape(task.name)}[/] as the model is: Dice of {escape(text)}")


def look_at_files(experiment: Experiment, quiet: bool = False) -> Survey:
    """Read whatever of the data was not read before (:func:`perdure.data.survey.survey`), with a progress bar.

    Data that is made on the fly has no files that could be damaged, and data of sealed tasks may be gone.
    """
    found = Survey([], {})
    console = Console(stderr=True, quiet=quiet)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:

        def begin(total: int) -> Callable[[], None]:
            shown = bar.add_task("checking files, once", total=total)
            return lambda: bar.advance(shown)

        for section, source in zip(experiment.recipe.sets, experiment.sources, strict=True):
            built_in = section.name in DATASETS and not needs_folder(section.name)
            if not built_in and not isinstance(source, GoneSource):
                found = found.joined(survey(source, begin))
    return found


def _refuse_damaged(experiment: Experiment, quiet: bool) -> None:
    """Raise DataError where a file of any split cannot be read; say what makes figures too good."""
    with stoppable("files were checked, before anything was learned", GO_ON):
        found = look_at_files(experiment, quiet)
    if found.problems:
        first, more = found.problems[0], len(found.problems) - 1
        others = f" (and {more} more: `perdure check` names them)" if more else ""
        raise DataError(f"{first.what}{others}", first.hint)
    for line in told(found.shared):
        Console(stderr=True, quiet=quiet).print(f"[yellow]note[/] {escape(line)}", highlight=False, soft_wrap=True)


@contextmanager
def _prepared(
    run: RunFolder, experiment: Experiment, machine: Machine, resume: bool, quiet: bool = False
) -> Iterator[RunFolder]:
    """Check, lock and fill the run folder; remove it again if recipe or data prove unusable before anything is saved.

    Only the main process writes. The others wait until it has prepared the folder, and leave silently if it cannot.
    """
    recipe, stream = experiment.recipe, experiment.stream
    sealed = len(run.sealed()) if resume and run.recipe_file.exists() else 0
    try:
        data, tolerance = data_of_tasks(recipe, len(stream)), recipe.evaluate.tolerance
        described = describe(stream, experiment.dataset, experiment.patients, experiment.kind, data, sealed, tolerance)
    except DataError:
        _refuse_damaged(experiment, quiet)  # which tells of all damaged files, not of the first one that was looked at
        raise
    working = WorkingFolder(run.path, recipe.engine.working)
    with ExitStack() as held:
        failed = True
        try:
            if machine.main:
                with run.read_alone():
                    run.check(recipe, described, resume)  # nothing has been written before this line
                _refuse_other_tests(experiment, run, sealed)
                refuse_empty_tasks(experiment, sealed)
                refuse_pictures_of_few(experiment, sealed)
                # the network per task that is still to come, and resume states with optimiser (8 networks)
                network: int = sum(t.nbytes for t in experiment.method.state_dict().values())
                done = len(run.sealed()) if run.recipe_file.exists() else 0
                if done < len(experiment.stream):
                    _refuse_damaged(experiment, quiet)
                run.space_for(network * (len(experiment.stream) - done + 8) + SPARE_BYTES)
                held.enter_context(run.locked())
                run.start(recipe, described, resume, _first_weights(experiment))
            failed = False
        finally:
            stopped = machine.any(failed)
        if stopped:
            raise SystemExit(1)  # the main process reports the reason
        try:
            yield run
        except (UsageError, DataError):
            machine.stop_trackers()
            if machine.main:
                working.clear()
                if run.sealed() and not run.resume.exists() and isinstance(recipe.stream, DataSetsSection):
                    held.close()
                    # a data set that cannot be learned must not stay in the way of the next one, nor in any page
                    if give_up(run):
                        record(run)
                        publish(run)
                else:
                    run.withdraw()
            raise


def _refuse_other_tests(experiment: Experiment, run: RunFolder, sealed: int) -> None:
    """Raise DataError where test cases of a sealed task are others than those that it was measured on."""
    for known, task in zip(run.stream().tasks[:sealed] if sealed else (), experiment.stream.tasks, strict=False):
        found = tests_fingerprint(task) if known.tests else ""
        if found and found != known.tests:
            raise DataError(
                f"the test cases of '{task.name}' are not those that it was measured on",
                "give the folder that it was learned from, or leave it out: figures of other cases tell nothing",
            )


def _first_weights(experiment: Experiment) -> Origin | None:
    """Origin of the network's initial weights, if recorded. Of a file only the name: a run contains no paths."""
    weights = next((part.weights for part in experiment.method.modules() if isinstance(part, Network)), None)
    if weights is None:
        return None
    source = weights.source if weights.source.startswith("timm/") else Path(weights.source).name
    return {"source": source, "sha256": weights.sha256, "licence": weights.licence}
