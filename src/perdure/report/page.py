"""``report.html`` and ``MODEL_CARD.md``: all that a reader asks first about a run, in files that need no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import yaml

from perdure.engine.duration import in_words
from perdure.metrics.changes import Changes, read_changes
from perdure.metrics.definitions import Figure, figure
from perdure.metrics.figures import evaluate, forgetting_by_group, group_matrix, headline, measured_tasks
from perdure.metrics.measured import RunResults, Value, at_zero, missing_tests
from perdure.report import kept_items
from perdure.report.plots import Line, curves
from perdure.report.render import WORDS, definitions, render
from perdure.report.run_data import RunData, load_run, section
from perdure.report.samples import SampleTable, chosen_samples, sample_table
from perdure.report.tables import case_rows, confusion_tables, heat_rows, ledger_table, mistakes
from perdure.streams.description import DescribedStream, DescribedTask

REPORT: Final = "report.html"
CARD: Final = "MODEL_CARD.md"
CONTINUAL: Final = ("dice.tasks", "wcd", "bwtr", "forgetting.appearance", "forgetting.semantics", "rma", "e-fwt", "mpe",
                    "drr")  # fmt: skip
"""Figures of the benchmark of continual medical segmentation, and what forgetting is made of."""
TRANSDUCTIVE: Final = (
    "the protocol is transductive: test images, without their labels, take part in training, so figures may be better "
    "than on images that the model never met"
)
VALIDATED: Final = (
    "all figures and sample pictures are of the validation set (evaluate.split: val), which serves to choose settings; "
    "they are no test figures"
)


def write_report(run: Path, page: Path | None = None, name: str | None = None) -> Path:
    """Write ``report.html`` into a run folder, complete or only partly done; equal runs give equal bytes.

    Args:
        run: The run folder.
        page: Another place to write to.
        name: What the page calls the run; by default the folder's name.

    Raises:
        RunError: The folder is not a run.
        DataError: A file of the run is damaged.
    """
    data = _loaded(run, name)
    results, stream, last = data.results, data.stream, data.results.last
    shown = data.shown.get(max(data.ledgers, default=-1), ())  # what is kept now; earlier items are superseded
    columns, pictures = kept_items.picture_rows(stream, kept_items.with_stages(data.shown, stream))
    distances = kept_items.memorisation(stream, shown)
    tasks = [t for t in data.samples if data.samples[t]]
    names = chosen_samples(list(data.samples[tasks[-1]])) if tasks else []
    table = None if last is None else results.cases.get(last)
    cases = [] if table is None else case_rows(stream, table)
    measured, continual = case_figures(stream)[: len(cases[0].figures) if cases else 0], continual_figures(results)
    shown_figures = [*headline(stream), WORDS[stream.kind].by_class, *measured, *dict(continual)]
    if stream.of_data_sets and stream.kind == "segmentation":
        shown_figures.append("dice")
    values = _common(data) | {
        "last_name": None if last is None else stream.tasks[last].spoken,
        "cards": headline_cards(results),
        "curves": run_curves(results),
        "changes": task_changes(run, data),
        "confusion": confusion_tables(results),
        "mistakes": mistakes(results),
        "cases": cases,
        "case_figures": measured,
        "continual": continual,
        "figure": figure,
        "definitions": definitions(shown_figures),
        "sample_tasks": [stream.tasks[t] for t in tasks],
        "samples": sample_table(names, [(stream, t, data.samples[t]) for t in tasks])
        if tasks
        else SampleTable([], [], []),
        "columns": columns,
        "pictures": pictures,
        "what_they_are": kept_items.what_they_are(stream, shown),
        "distances": distances,
        "recipe": yaml.safe_dump(dict(data.recipe), sort_keys=False, allow_unicode=True),
        "terms": kept_items.TERMS if distances else (),
    }
    return render("report.html.j2", values, page or run / REPORT)


def write_model_card(run: Path, page: Path | None = None, name: str | None = None) -> Path:
    """Write ``MODEL_CARD.md`` into a run folder, complete or only partly done.

    It says what the model is, which tasks made it, how good it is, what it keeps and what it is not for. Arguments: see
    :func:`write_report`.

    Raises:
        RunError: The folder is not a run.
        DataError: A file of the run is damaged.
    """
    data = _loaded(run, name)
    about = section(data.recipe, "data")
    values = _common(data) | {
        "licence": about.get("licence") or about.get("license"),
        "notes": about.get("notes"),
        "history": gone_history(data.results),
        "about": data.recipe.get("about") or "",
        "version": data.environment.get("perdure"),
    }
    return render("model_card.md.j2", values, page or run / CARD)


def _loaded(run: Path, name: str | None) -> RunData:
    data = load_run(run)
    return data if name is None else replace(data, name=name)


def _common(data: RunData) -> dict[str, object]:
    """What both templates lay out."""
    results, stream = data.results, data.stream
    words, shown, last = WORDS[stream.kind], headline(stream), results.last
    return {
        "run": data,
        "stream": stream,
        "names": stream.names,
        "last": results.last,
        "measured": [stream.tasks[t] for t in results.counts],
        "figures": [(name, [evaluate(name, results, t) for t in results.counts]) for name in shown],
        "cases_of": {t: own_tests(results, t) for t in results.counts},
        "tested": [results.counts[t].cases for t in results.counts],
        "heat": [] if results.last is None else heat_rows(results),
        "words": words,
        "took": {t: in_words(s) for t, s in data.seconds.items()},
        "took_all": in_words(sum(data.seconds.values())) if len(data.seconds) == data.sealed > 0 else None,
        "alone": [] if last is None else [(stream.tasks[j], value) for j, value in measured_tasks(results, last)],
        "lacking": "" if last is None else missing_tests(results, last),
        "unlearned": unlearned(results),
        "for_small": for_small_objects(stream.tasks[0].preparation.get("kind")),
        "warnings": warnings(stream) + [gone_sets(results)] * any(results.gone.values()),
        "images": stream.measured_images,
        "ledger": ledger_table(data.ledgers),
        "definitions": definitions([*shown, words.by_class]),
    }


def own_tests(results: RunResults, task: int) -> int:
    """Number of measured images of a task: those of its own set where each has one, otherwise all that there are."""
    return results.tested.get(task, {}).get(results.stream.tasks[task].name, results.counts[task].cases)


def headline_cards(results: RunResults) -> list[tuple[Figure, Value]]:
    """The headline figures after the last task; where test sets are gone, only those that there are."""
    last = results.last
    cards = [] if last is None else [(figure(n), evaluate(n, results, last)) for n in headline(results.stream)]
    gone = last is not None and results.gone.get(last)
    return [(fig, value) for fig, value in cards if not gone or value.value is not None]


def for_small_objects(kind: object) -> str:
    """What to try where small objects are not learned: the keys that a preparation of this kind has."""
    if kind == "volume3d":
        return "a larger volumes.patch or a finer volumes.spacing where structures are small"
    if kind == "slices2d":
        return "a larger volumes.size where structures are small"
    return "a larger augment.crop where objects are small"


def unlearned(results: RunResults) -> list[tuple[DescribedTask, list[str]]]:
    """Tasks after which some of the classes that they teach were at 0, with the names of these classes."""
    stream = results.stream
    found = [
        (stream.tasks[t], at_zero(counts, stream.tasks[t].new, stream.kind)) for t, counts in results.counts.items()
    ]
    return [(task, [stream.space.name(c) for c in zero]) for task, zero in found if zero]


def warnings(stream: DescribedStream) -> list[str]:
    """What a reader of any figure of this stream has to know first."""
    transductive = TRANSDUCTIVE.replace("test images", f"{stream.measured_images} images")
    said = [(stream.measured != "test", VALIDATED), ("transductive" in stream.protocol, transductive)]
    return [text for holds, text in said if holds]


def gone_sets(results: RunResults) -> str:
    """What a reader has to know where test sets of earlier tasks are no longer there."""
    why = dict.fromkeys(gone.why(results.stream) for sets in results.gone.values() for gone in sets)
    return f"{'; '.join(why)}: figures that need them are left out where this is so, with this reason"


def gone_history(results: RunResults) -> list[tuple[DescribedTask, list[str]]]:
    """Tasks after which test sets of earlier tasks were not at hand, with what was missing."""
    stream = results.stream
    return [(stream.tasks[t], [gone.why(stream) for gone in sets]) for t, sets in results.gone.items() if sets]


def task_changes(run: Path, data: RunData) -> list[tuple[DescribedTask, Changes]]:
    """What each sealed task of a stream of data sets did to what was learned before it, where that was measured.

    Raises:
        DataError: A file of counts is damaged.
    """
    found = [(task, read_changes(run, data.stream, task.index)) for task in data.stream.tasks[: data.sealed]]
    return [(task, changes) for task, changes in found if changes is not None]


def case_figures(stream: DescribedStream) -> list[str]:
    """Full names of the figures over cases, in the order of :data:`perdure.metrics.cases.MEASURES`."""
    return ["dice.cases", "hd95[mm]", "asd[mm]", f"nsd[mm,{stream.tolerance:g}]"]


def continual_figures(results: RunResults) -> list[tuple[str, Value]]:
    """Figures of continual segmentation after the last task, with the reason where there is no value.

    None of joint runs, nor of runs that did not record single cases.
    """
    if results.last not in results.cases or results.last is None or len(results.stream.tasks) == 1:
        return []
    return [(str(figure(name)), evaluate(name, results, results.last)) for name in CONTINUAL]


def run_curves(results: RunResults) -> list[tuple[str, str]]:
    """Title and SVG of curves: how good the model is, and forgetting by task; streams of one task have none."""
    stream = results.stream
    tasks, words = stream.tasks, WORDS[stream.kind]
    if len(tasks) == 1:
        return []

    def over_tasks(name: str) -> list[float | None]:
        return [evaluate(name, results, t).value for t in range(len(tasks))]

    def of_group(j: int, rows: dict[int, list[float | None]]) -> list[float | None]:
        return [rows[t.index][j] if j < len(rows.get(t.index, [])) else None for t in tasks]

    rows, shown = group_matrix(results, words.of), headline(stream)
    if stream.kind == "classification":
        quality = [Line("all images", over_tasks(shown[0]), 0), Line("balanced", over_tasks(shown[1]), 0, dashed=True)]
        quality += [Line(tasks[j].called, of_group(j, rows), j + 1) for j in range(len(stream.groups))]
    else:
        titled = (("all", "miou.all"), ("first task's classes", "miou.old"), ("later classes", "miou.new"))
        quality = [Line(title, over_tasks(name), k, dashed=k == 0) for k, (title, name) in enumerate(titled)]
    lost = {t: forgetting_by_group(rows, t) for t in rows}
    losses = [Line("mean", over_tasks(words.forgetting), 0, dashed=True)]
    losses += [Line(tasks[j].called, of_group(j, lost), j + 1) for j in range(len(stream.groups) - 1)]
    names = [t.called for t in tasks]
    drawn = []
    if stream.of_data_sets and stream.kind == "segmentation":
        dice = group_matrix(results, "dice")
        own = [Line(tasks[j].called, of_group(j, dice), j + 1) for j in range(len(stream.groups))]
        drawn.append(("Each task's structures after every task", curves("own", own, names, "mean Dice in %")))
    drawn += [
        ("How good the model is after each task", curves("quality", quality, names, f"{words.quality} in %")),
        (
            "What it forgot of each task's classes",
            curves("forgetting", losses, names, f"points of {words.quality} lost"),
        ),
    ]
    return [(title, svg) for title, svg in drawn if svg]
