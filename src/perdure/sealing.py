"""The end of a task: measure, write what is retained, mark it done; and how a run is restored from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

from rich.markup import escape
from torch import Tensor

from perdure.before import Before
from perdure.config.build import Experiment
from perdure.data.case import Case
from perdure.data.dataset import Dataset, members
from perdure.data.source import MEASURED
from perdure.engine.machine import Machine
from perdure.engine.run_logger import RunLogger
from perdure.engine.state import restore
from perdure.errors import DataError
from perdure.files import write_json
from perdure.inference.case import predict_cases
from perdure.kept.ledger import DONE, preview_entry, task_folder, write_ledger
from perdure.kept.manifest import CASES, CHANGES, GROWING, KINDS, NUMBERS, REMADE, event_files
from perdure.kept.method_state import read_files, read_kept, weight_names, write_kept
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.metrics.cases import write_cases
from perdure.metrics.confusion import ConfusionMatrix, pooled, write_counts
from perdure.metrics.evaluate import Counted, count
from perdure.metrics.figures import evaluate as value_of
from perdure.metrics.figures import headline, measured_tasks
from perdure.metrics.measured import RunResults, at_zero, class_values, missing_tests
from perdure.metrics.numbers import TaskNumbers
from perdure.metrics.results import gather_results, write_results
from perdure.report.page import for_small_objects, write_model_card, write_report
from perdure.report.samples import write_class_samples, write_samples
from perdure.report.slices import MOST_SIDE
from perdure.run_folder import RunFolder
from perdure.seeds import derive_seed, seeded
from perdure.streams.description import called
from perdure.streams.summary import class_images, distinct_class_images, shows_a_class
from perdure.streams.task import Task

Predicted = dict[tuple[str, str], Tensor]
"""Test set and name of a case -> predicted labels ``(*S)`` int16."""


def begin(method: Method[Options], task: Task, seed: int) -> None:
    """Prepare a method for a task; fresh classifiers depend on the seed and the task only."""
    with seeded(derive_seed(seed, "begin", task.index)):
        method.begin(task)


def restore_sealed(
    method: Method[Options], tasks: Sequence[Task], run: RunFolder, sealed: Sequence[Path], seed: int
) -> None:
    """Bring a fresh method to where it was after the last of the sealed task folders, and give it the run's files."""
    method.store = run.store
    for task, folder in zip(tasks, sealed, strict=False):
        begin(method, task, seed)
        method.files = read_files(folder)  # the next `begin` may drop some of them, as it did when the run went on
    if sealed:
        restore(method, read_kept(sealed[-1]))


def seal(
    experiment: Experiment,
    task: Task,
    run: RunFolder,
    machine: Machine,
    logger: RunLogger,
    before: Before | None = None,
    named: float | None = None,
) -> None:
    """Write weights, kept items, ledger, counts, samples and results of a task; the mark ``done`` comes last."""
    method = experiment.method
    method.eval()
    tolerance, counted = experiment.recipe.evaluate.tolerance, dict[str, Counted]()
    predicted: Predicted = {}
    for name, dataset in task.tests().items():
        compare = before.compare if before is not None and name == task.name else None
        each = _keep_pictured(experiment, name, dataset, predicted, compare)
        counted[name] = _count(experiment, dataset, task, machine, tolerance, each)
    counts = {name: sum_of.matrix for name, sum_of in counted.items()}
    changed = None if before is None else before.finished(machine)
    if machine.main:
        folder, previous = task_folder(run.path, task.index, task.name), next(iter(run.sealed()[-1:]), None)
        patients, state = experiment.patients, method.state_dict()
        least = experiment.recipe.privacy.min_images
        entries = write_kept(
            folder,
            state,
            method.kept(),
            len(task.seen),
            method.files,
            method.store,
            previous,
            least=least if patients else 0,
            own=weight_names(method),
        )
        method.store.sweep(task.index, [name for names in method.files.values() for name in names])
        write_counts(folder / "counts.json", counts)
        if changed is not None:
            write_counts(folder / CHANGES, changed)
        measured = TaskNumbers() if before is None else before.numbers
        numbers = measured.model_copy(update={"replayed": method.replayed, "named": named})
        if numbers != TaskNumbers():
            write_json(folder / NUMBERS, numbers.model_dump(mode="json"))
        if cases := {name: sum_of.cases for name, sum_of in counted.items() if sum_of.cases is not None}:
            write_cases(folder / CASES, cases)
        shown = MEASURED[experiment.stream.measured]
        entries += [
            preview_entry(folder, path, patients, shown)
            for path in _samples(experiment, task, machine, folder, predicted)
        ]
        write_ledger(folder, task.name, entries, patients, least)
        # last: without it the task counts as not sealed, and a resumed run does it again
        write_json(folder / DONE, {"task": task.index})
        results = record(run)
        values = {name: value_of(name, results, task.index).value for name in headline(results.stream)}
        figures = {name: value for name, value in values.items() if value is not None}
        logger.log(task=task.index + 1, event="sealed", **figures)
        told = [f"{name.partition('[')[0]} [bold]{value:.1f}[/]" for name, value in figures.items()]
        if lacking := missing_tests(results, task.index):
            of, names = "Dice" if experiment.kind == "segmentation" else "accuracy", results.stream.tasks
            told += [
                f"{of} of {escape(names[j].called)} [bold]{value:.1f}[/]"
                for j, value in measured_tasks(results, task.index)
            ]
            told.append(escape(f"({lacking})"))
        text = "  ".join(told)
        on = "" if experiment.stream.measured == "test" else f"  on {shown} images"
        title = called(task.name, len(task.new))
        logger.say(f"[green]sealed[/] task {task.index + 1} of {len(experiment.stream)} ({title})  {text}{on}")
        _say_what_was_not_learned(experiment, task, counts, logger)
        publish(run, [folder])
    machine.barrier()


def _say_what_was_not_learned(
    experiment: Experiment, task: Task, counts: Mapping[str, ConfusionMatrix], logger: RunLogger
) -> None:
    """Name classes that ended at 0 in a task that teaches them, with what to try: later tasks cannot mend it.

    Known ones that the task annotates again count on its own test set, where it has one.
    """
    zero = at_zero(pooled(counts), task.new, experiment.kind)
    if (own := counts.get(task.name)) is not None:
        zero += at_zero(own, [c for c in task.old if c in task.annotated], experiment.kind)
    if zero:
        names = [experiment.stream.space.name(c) for c in zero]
        for c in zero:
            logger.log(task=task.index + 1, event="unlearned", class_id=c)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        training, later = experiment.recipe.training, "later_" if task.index else ""
        length = "steps" if training.steps or (task.index and training.later_steps) else "epochs"
        logger.say(
            f"[yellow]not learned[/] {escape(shown)}: at 0 after the task that teaches "
            f"{'it' if len(zero) == 1 else 'them'}; try more training.{later}{length}, another training.{later}lr, "
            f"{for_small_objects(task.preparation.kind)}, or more training images"
        )


def measure_validation(experiment: Experiment, task: Task, machine: Machine) -> Callable[[], Mapping[str, float]]:
    """Return a function that measures the new classes on the task's validation set, for information only.

    Their mean IoU, or their mean recall where an image has one class.
    """
    figure, name = ("recall", "accuracy") if experiment.kind == "classification" else ("iou", "miou")

    def measure() -> Mapping[str, float]:
        experiment.method.eval()
        parts = [_count(experiment, dataset, task, machine).matrix for dataset in members(task.validation())]
        values = class_values(figure, reduce(add, parts))
        new = [value for c in task.new if (value := values[c].value) is not None]
        return {f"validation.{name}.new": sum(new) / len(new)} if new else {}

    return measure


def _count(
    experiment: Experiment,
    dataset: Dataset,
    task: Task,
    machine: Machine,
    tolerance: float | None = None,
    each: Callable[[int, Tensor], None] | None = None,
) -> Counted:
    """Counts of the present model over a test or validation set; with a tolerance surfaces are measured too."""
    at_once, workers = experiment.recipe.evaluate.batch_size, experiment.recipe.engine.workers
    predict = experiment.method.predict
    return count(predict, dataset, task.seen, machine, at_once, workers, tolerance, each)


def _pictured(experiment: Experiment, dataset: Dataset) -> dict[str, int]:
    """Names and places of the few images of a test set that are shown after every task; none of patients unless asked.

    They are spread over all images of the measured split, so that which ones they are does not depend on the tasks
    that are still to come, nor on the method.
    """
    report = experiment.recipe.report
    if not report.samples or (experiment.patients and not report.patient_samples):
        return {}
    names = dataset.source.names(dataset.split)
    return {names[k]: k for k in (i * len(names) // report.samples for i in range(report.samples))}


def _keep_pictured(
    experiment: Experiment,
    test: str,
    dataset: Dataset,
    predicted: Predicted,
    compare: Callable[[int, Tensor], None] | None,
) -> Callable[[int, Tensor], None]:
    """Keep the predictions that pictures show while they are measured: to predict a volume again takes minutes."""
    wanted = _pictured(experiment, dataset)

    def each(position: int, labels: Tensor) -> None:
        if compare is not None:
            compare(position, labels)
        if dataset.names[position] in wanted:
            predicted[test, dataset.names[position]] = labels.short().cpu()

    return each


def _samples(
    experiment: Experiment, task: Task, machine: Machine, folder: Path, known: Mapping[tuple[str, str], Tensor]
) -> list[Path]:
    """Pictures of the same few measured images after every task, see :func:`_pictured`.

    Images that were not measured as they are shown are predicted here: those that show no class of so far, those that
    another process measured, those that are measured after scaling, and all where an image has one class.
    """
    files = list[Path]()
    palette, tests = experiment.stream.space.palette(), task.tests()
    for test, dataset in tests.items():
        whole = replace(dataset, names=tuple(dataset.source.names(dataset.split)))
        for name, position in _pictured(experiment, dataset).items():
            case = whole.read(position)
            kept = known.get((test, name))
            if kept is None or kept.shape != case.label.shape:
                kept = _predicted(experiment, case, whole, machine)
            predicted = kept
            image, label, step = case.image, case.label, -(-max(case.image.shape[1:]) // MOST_SIDE)
            place = (folder / "samples", f"{test}-{position:05d}" if len(tests) > 1 else f"{position:05d}")
            if not label.ndim:
                files += write_class_samples(*place, image[:, ::step, ::step], int(label), int(predicted))
                continue
            if label.ndim == 2:
                image, label, predicted = image[:, ::step, ::step], label[::step, ::step], predicted[::step, ::step]
            files += write_samples(
                *place, image, label.numpy(), predicted.numpy(), palette, case.annotated, case.geometry
            )
    return files


def _predicted(experiment: Experiment, case: Case, dataset: Dataset, machine: Machine) -> Tensor:
    """The model's labels of one raw case of a test set, ``(*S)``; its class where an image has one."""
    ready = dataset.preparation.show(case)
    assert ready.grid is not None  # every preparation gives one to a case that is to be predicted
    images = ready.image[None].to(machine.device)
    with machine.autocast("fp32"):
        return predict_cases(experiment.method.predict, images, dataset.preparation, ready.grid).labels[0].cpu()


def publish(run: RunFolder, sealed: Sequence[Path] = ()) -> None:
    """Write the pages again, and take them, results, log and what was sealed into the list of files."""
    write_model_card(run.path)
    write_report(run.path)
    top = [place for place, kind in KINDS.items() if kind in REMADE | GROWING]
    run.list_files([*top, *event_files(run.path)], sealed)


def refuse_empty_tasks(experiment: Experiment, sealed: int = 0) -> None:
    """Refuse tasks of which there is nothing to learn before any of them is trained.

    Raises:
        DataError: No training image of a task that is still to come shows a class that it annotates.
    """
    for task in experiment.stream.tasks[sealed:]:
        if not shows_a_class(task):
            raise DataError(f"task '{task.name}': no training image shows a class that it annotates", "check its masks")


def refuse_pictures_of_few(experiment: Experiment, sealed: int = 0) -> None:
    """Refuse classes of too few images of patients before training, where the method keeps means that look like images.

    Raises:
        DataError: A class of a task that is still to come has fewer training images than ``privacy.min_images``.
    """
    if not (experiment.patients and experiment.method.averages_images):
        return
    least = experiment.recipe.privacy.min_images
    for task in experiment.stream.tasks[sealed:]:
        found = class_images(task)
        if min(found.values(), default=least) >= least:
            found = distinct_class_images(task)  # only now are the images themselves read, for a copy is no more
        name = experiment.stream.space.name
        counts = {f"the class '{name(class_id)}'": images for class_id, images in found.items()}
        # statistics of the background are averaged too, also where a task brings no new class
        counts[f"the task '{task.name}'"] = 0 if task.data is None else len(task.data.train())
        for what, images in counts.items():
            if images < least:
                raise DataError(
                    f"{what} has {images} training images of patients, but '{experiment.recipe.method.name}' keeps "
                    f"their mean, which needs at least {least} to be no picture of single patients",
                    "add images, leave the class out, take a method or a method.replay that keeps no such pictures "
                    "(star, finetune or lwf without impressions), or lower privacy.min_images",
                )


def record(run: RunFolder) -> RunResults:
    """Write the result files from what all sealed tasks hold, and return that."""
    stream = run.stream()
    results = gather_results(stream, run.sealed())
    write_results(run.path, results)
    return results
