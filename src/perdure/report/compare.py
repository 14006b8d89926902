"""Runs side by side: the same figures after the same task, seeds put alike, the best one marked."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import UsageError
from perdure.metrics.definitions import Figure, figure
from perdure.metrics.figures import RunResults, evaluate, headline
from perdure.report.comparable import about_protocols, check_same
from perdure.report.render import NONE, number
from perdure.report.run_data import RunData, load_run
from perdure.report.words import words

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Score:
    """A figure over the runs of an entry: mean, standard deviation (n - 1; ``None`` for one run), each run's value."""

    mean: float | None
    sd: float | None
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Entry:
    """One line of a comparison: a run, or runs that differ by seed only.

    Args:
        label: Name in tables.
        method: Name of the method.
        runs: Names of the folders.
        seeds: Their seeds.
        reference: True for joint training, which saw all data at once: it is shown but does not compete.
        kept_bytes: Mean bytes besides weights and previews in the ledger after the compared task.
        weight_bytes: Mean bytes of weights there.
        scores: By full name of the figure.
    """

    label: str
    method: str
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    reference: bool
    kept_bytes: int | None
    weight_bytes: int | None
    scores: dict[str, Score]


@dataclass(frozen=True)
class Comparison:
    """Figures of several runs after one task.

    Args:
        dataset: Data set of all runs.
        protocol: Protocol of the stream.
        after: Task after which runs are compared.
        task: Its name.
        tasks: Number of tasks of the stream.
        figures: Full names, in order.
        entries: The lines.
        best: Label of the best entry by figure; references do not compete, ties go to the first.
        notes: What a reader has to know.
    """

    dataset: str
    protocol: str
    after: int
    task: str
    tasks: int
    figures: tuple[str, ...]
    entries: tuple[Entry, ...]
    best: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Runs that make one entry, with the task of theirs that is compared (``None``: none fits)."""

    label: str
    runs: tuple[RunData, ...]
    after: int | None


def compare(runs: Sequence[Path], figures: Sequence[str] | None = None) -> Comparison:
    """Compare runs of one stream, or of one stream and its merged (joint) form.

    Args:
        runs: Run folders, complete or not.
        figures: Names of figures; the headline figures of the stream if not given.

    Raises:
        UsageError: No run, runs of different streams, unknown figure.
        RunError: A folder is not a run.
        DataError: No task is done in one of the runs.
    """
    groups, notes = group_runs([load_run(path) for path in runs])
    return compare_groups(groups, notes, figures)


def group_runs(runs: Sequence[RunData]) -> tuple[list[Group], list[str]]:
    """Check that runs can be compared; put those alike that differ by seed only; give joint runs as reference."""
    if not runs:
        raise UsageError("there is nothing to compare", "give two or more run folders")
    for run in runs[1:]:
        check_same(runs[0], run)
    for run in runs:
        if run.results.last is None:
            raise UsageError(f"run '{run.name}' has no finished task yet", "leave it out, or go on with it: --resume")
    tasks = max(len(r.stream.tasks) for r in runs)
    stepwise = [r for r in runs if len(r.stream.tasks) == tasks]
    after = min(r.results.last or 0 for r in stepwise)
    joint = next((r.results for r in runs if r.stream.merged), None)
    alike: dict[tuple[str, str, bool], list[RunData]] = {}
    for run in runs:
        known = replace(run, results=replace(run.results, reference=joint))
        alike.setdefault((run.method, run.settings, run.stream.merged), []).append(known)
    whole = after == tasks - 1
    groups = [
        Group(label, tuple(members), after if len(members[0].stream.tasks) == tasks else (0 if whole else None))
        for label, members in zip(_labels(list(alike.values())), alike.values(), strict=True)
    ]
    notes = []
    if not whole:
        notes.append(f"compared after task {after + 1} of {tasks}, the last one that all runs have done")
        if joint is not None and tasks > 1:
            notes.append("joint runs know all classes at once and cannot be compared before the last task")
    if len(stepwise) < len(runs):
        notes.append("joint runs train on all data at once: they are a reference and do not compete")
    return groups, [*notes, *about_protocols(runs)]


def compare_groups(groups: Sequence[Group], notes: Sequence[str], figures: Sequence[str] | None) -> Comparison:
    """Compute the figures of gathered runs."""
    first = max((g for g in groups), key=lambda g: len(g.runs[0].stream.tasks))
    stream, after = first.runs[0].stream, first.after or 0
    wanted = [figure(name, stream.background is not None) for name in figures or headline(stream)]
    if figures is None and any(g.runs[0].stream.merged for g in groups):
        wanted.append(figure(words(stream).intransigence))
    for fig in wanted:
        if fig.definition.scope == "class":
            raise UsageError(f"'{fig}' has one value for each class", "compare miou.all, dice.all or accuracy.mean")
    entries = tuple(_entry(group, wanted) for group in groups)
    best = {str(f): label for f in wanted if (label := _best(f, entries)) is not None}
    return Comparison(
        stream.dataset,
        stream.protocol,
        after,
        stream.tasks[after].name,
        len(stream.tasks),
        tuple(map(str, wanted)),
        entries,
        best,
        tuple(notes),
    )


def comparison_table(comparison: Comparison) -> Table:
    """Table for a terminal: one line a figure, one column an entry, the best value in bold green."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    where = f"after task {comparison.task}, {comparison.after + 1} of {comparison.tasks}"
    caption = "; ".join(comparison.notes)
    title = f"{comparison.dataset}, {comparison.protocol}: {where}"
    table = Table(title=title, caption=caption or None, box=SIMPLE_HEAD)
    table.add_column("figure", no_wrap=True)
    for entry in comparison.entries:
        label = _plain(entry.label)
        table.add_column(f"[italic]{label}[/]" if entry.reference else label, justify="right", overflow="fold")
    for name in comparison.figures:
        better = "↓" if figure(name).definition.better == "lower" else "↑"
        cells = [_rich(e.scores[name], comparison.best.get(name) == e.label) for e in comparison.entries]
        table.add_row(f"{_plain(name)} {better}", *cells)
    kept = (NONE if e.kept_bytes is None else f"{e.kept_bytes:,}" for e in comparison.entries)
    table.add_row("bytes kept besides weights", *kept)
    return table


def _plain(text: str) -> str:
    """Text in which rich finds no markup."""
    return text.replace("[", "\\[")


def score_text(score: Score) -> str:
    """``72.1`` or ``72.1 ± 0.4``."""
    return number(score.mean) + ("" if score.sd is None else f" ± {score.sd:.1f}")


def _rich(score: Score, best: bool) -> str:
    text = score_text(score)
    return f"[bold green]{text}[/]" if best else text


def _labels(groups: Sequence[Sequence[RunData]]) -> list[str]:
    """Method names where they tell the groups apart, else names of run folders; never twice the same."""
    methods = [g[0].method for g in groups]
    labels: list[str] = []
    for group in groups:
        seeds = f" ({len(group)} runs)" if len(group) > 1 else ""
        alone = methods.count(group[0].method) == 1
        label = group[0].method + seeds if alone else ", ".join(r.name for r in group)
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def _entry(group: Group, figures: Sequence[Figure]) -> Entry:
    first = group.runs[0]
    values = {str(f): [_value(f, r.results, group.after) for r in group.runs] for f in figures}
    return Entry(
        group.label,
        first.method,
        tuple(r.name for r in group.runs),
        tuple(r.seed for r in group.runs),
        first.stream.merged,
        _mean_bytes(group, kept=True),
        _mean_bytes(group, kept=False),
        {name: _score(v) for name, v in values.items()},
    )


def _value(fig: Figure, results: RunResults, after: int | None) -> float | None:
    """Value to compare; figures over tasks mean nothing for a joint run."""
    if after is None or (results.stream.merged and fig.definition.scope == "stream"):
        return None
    return evaluate(fig, results, after).value


def _score(values: Sequence[float | None]) -> Score:
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return Score(None, None, tuple(values))
    return Score(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, tuple(values))


def _mean_bytes(group: Group, kept: bool) -> int | None:
    """Mean bytes in the ledger after the compared task: weights, or what is kept besides them."""
    if group.after is None:
        return None
    totals = [
        sum(int(i["bytes"]) for i in r.ledgers[group.after]["items"] if _counts(str(i["kind"]), kept))
        for r in group.runs
        if group.after in r.ledgers
    ]
    return round(statistics.fmean(totals)) if totals else None


def _counts(kind: str, kept: bool) -> bool:
    return kind not in ("weights", "preview") if kept else kind == "weights"


def _best(fig: Figure, entries: Sequence[Entry]) -> str | None:
    scores = [(e.label, m) for e in entries if not e.reference and (m := e.scores[str(fig)].mean) is not None]
    if len(scores) < 2:
        return None
    pick = max if fig.definition.better == "higher" else min
    return pick(scores, key=lambda pair: pair[1])[0]
