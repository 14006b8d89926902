"""Runs side by side: the same figures after the same task, seeds put alike, the best one marked."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from perdure.errors import UsageError
from perdure.metrics.definitions import Figure, figure
from perdure.metrics.figures import evaluate, headline
from perdure.report.page import TRANSDUCTIVE, VALIDATED
from perdure.report.render import NONE, WORDS, number
from perdure.report.run_data import RunData, differing_settings, load_run
from perdure.streams.description import DescribedStream

if TYPE_CHECKING:
    from rich.table import Table


MOST_SETTINGS: Final = 8
"""Settings that differ, told one by one."""
INDEPENDENT: Final = "independent"
"""The method that learns each task with a model of its own."""


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
        split: The split that is measured: ``test`` or ``val``.
        after: Task after which runs are compared.
        task: Its name.
        spoken: What people call it.
        tasks: Number of tasks of the stream.
        figures: Full names, in order.
        entries: The lines.
        best: Label of the best entry by figure; references do not compete, ties go to the first.
        notes: What a reader has to know.
    """

    dataset: str
    protocol: str
    split: str
    after: int
    task: str
    spoken: str
    tasks: int
    figures: tuple[str, ...]
    entries: tuple[Entry, ...]
    best: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Runs that make one entry, with the task of theirs that is compared (``None``: none fits)."""

    label: str
    runs: tuple[RunData, ...]
    after: int | None

    @property
    def stream(self) -> DescribedStream:
        """Classes and tasks of the first run; those of the others are the same."""
        return self.runs[0].stream

    def score(self, figure: Figure, after: int | None) -> Score:
        """A figure over the runs after a task; figures over tasks mean nothing for a joint run."""
        if after is None or (self.stream.merged and figure.definition.scope == "stream"):
            return Score(None, None, (None,) * len(self.runs))
        values = [evaluate(figure, run.results, after).value for run in self.runs]
        known = [v for v in values if v is not None]
        if not known or len(known) < len(values):  # a mean over some of the seeds would not be comparable
            return Score(None, None, tuple(values))
        return Score(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, tuple(values))

    def why_not(self, figure: Figure) -> str:
        """Why a figure does not exist after the compared task, where more can be said than that."""
        if self.after is None or (self.stream.merged and figure.definition.scope == "stream"):
            return ""
        reasons = (evaluate(figure, run.results, self.after).why for run in self.runs)
        return next(filter(None, reasons), "")

    def kept_bytes(self, weights: bool) -> int | None:
        """Mean bytes in the ledger after the compared task: weights, or what is kept besides weights and previews."""
        totals = []
        for run in self.runs:
            if self.after is not None and self.after in run.ledgers:
                kinds = [(item.kind, item.bytes) for item in run.ledgers[self.after]]
                chosen = [size for kind, size in kinds if (kind == "weights") == weights and kind != "preview"]
                totals.append(sum(chosen))
        return round(statistics.fmean(totals)) if totals else None


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
    """Check that runs can be compared; put those alike that differ by seed only; give joint runs as reference.

    Returns:
        The entries, and notes that a reader has to know of.
    """
    if not runs:
        raise UsageError("there is nothing to compare", "give two or more run folders")
    for run in runs[1:]:
        check_same(runs[0], run)
    for run in runs:
        if run.results.last is None:
            raise UsageError(f"run '{run.name}' has no finished task yet", "leave it out, or go on with it: --resume")
    tasks = max(len(r.stream.tasks) for r in runs)
    stepwise = [r for r in runs if len(r.stream.tasks) == tasks]
    after = min(r.results.last or 0 for r in stepwise)  # a task that one of them lacks says nothing of the others
    joint = next((r.results for r in runs if r.stream.merged), None)
    alone = next((r.results for r in runs if r.method == INDEPENDENT and not r.stream.merged), None)
    alike: dict[tuple[str, str, bool], list[RunData]] = {}
    for run in runs:  # what intransigence and relative plasticity are measured against
        known = replace(run, results=replace(run.results, reference=joint, alone=alone))
        alike.setdefault((run.method, run.settings, run.stream.merged), []).append(known)
    whole = after == tasks - 1
    methods = [members[0].method for members in alike.values()]
    groups: list[Group] = []
    for members in alike.values():
        label = members[0].method + (f" ({len(members)} runs)" if len(members) > 1 else "")
        if methods.count(members[0].method) > 1:  # the method does not tell the entries apart: name the folders
            label = ", ".join(r.name for r in members)
        while any(label == group.label for group in groups):
            label += "'"
        fits = after if len(members[0].stream.tasks) == tasks else 0 if whole else None
        groups.append(Group(label, tuple(members), fits))
    notes = []
    if not whole:
        notes.append(f"compared after task {after + 1} of {tasks}, the last one that all runs have done")
        if joint is not None and tasks > 1:
            notes.append("joint runs know all classes at once and cannot be compared before the last task")
    if len(stepwise) < len(runs):
        notes.append("joint runs train on all data at once: they are a reference and do not compete")
    protocols = list(dict.fromkeys(r.stream.protocol.removesuffix(", merged") for r in runs))
    if len(protocols) > 1:
        notes.append(f"the protocols of joint and other runs differ: {'; '.join(protocols)}")
    if differ := differing_settings({group.label: group.runs[0] for group in groups}):
        shown = "; ".join(differ[:MOST_SETTINGS])
        more = f"; and {len(differ) - MOST_SETTINGS} more" if len(differ) > MOST_SETTINGS else ""
        notes.append(f"not only the methods differ: {shown}{more}")
    windows = dict.fromkeys("".join(r.stream.evaluation) for r in runs)
    if len(windows) > 1:
        notes.append(f"larger images were cut differently: {'; '.join(windows)}")
    if runs[0].stream.measured != "test":
        notes.append(VALIDATED)
    warned = [r.name for r in runs if "transductive" in r.stream.protocol]
    if warned:
        notes.append(TRANSDUCTIVE if len(warned) == len(runs) else f"{TRANSDUCTIVE} (runs {', '.join(warned)})")
    return groups, notes


def check_same(a: RunData, b: RunData) -> None:
    """Raise UsageError unless two runs have the same data, classes and groups."""
    one, other = a.stream, b.stream
    same = {
        "data set": one.dataset == other.dataset,
        "classes": [(c.id, c.name) for c in one.classes] == [(c.id, c.name) for c in other.classes],
        "kind of labels": one.kind == other.kind,
        "background": one.background == other.background,
        "split of the classes into tasks": one.groups == other.groups,
        "protocol": one.merged or other.merged or one.protocol == other.protocol,
        "measured split": one.measured == other.measured,
        "evaluation": one.evaluation[0] == other.evaluation[0],
    }
    differs = next((what for what, equal in same.items() if not equal), None)
    if differs:
        both = {
            "protocol": (one.protocol, other.protocol),
            "measured split": (one.measured_images, other.measured_images),
            "evaluation": (one.evaluation[0], other.evaluation[0]),
        }
        said = " ('{}' and '{}')".format(*both[differs]) if differs in both else ""
        raise UsageError(
            f"runs '{a.name}' and '{b.name}' cannot be compared: their {differs} is not the same{said}",
            "compare runs of one stream (joint runs of the same classes may join)",
        )


def compare_groups(groups: Sequence[Group], notes: Sequence[str], figures: Sequence[str] | None) -> Comparison:
    """Compute the figures of gathered runs."""
    first = max(groups, key=lambda g: len(g.stream.tasks))
    stream, after = first.stream, first.after or 0
    wanted = [figure(name, stream.background is not None) for name in figures or headline(stream)]
    if figures is None and any(g.stream.merged for g in groups):
        wanted.append(figure(WORDS[stream.kind].intransigence))
    for fig in wanted:
        if fig.definition.scope == "class":
            raise UsageError(f"'{fig}' has one value for each class", "compare miou.all, dice.all or accuracy.mean")
    entries = tuple(
        Entry(
            label=group.label,
            method=group.runs[0].method,
            runs=tuple(r.name for r in group.runs),
            seeds=tuple(r.seed for r in group.runs),
            reference=group.stream.merged,
            kept_bytes=group.kept_bytes(weights=False),
            weight_bytes=group.kept_bytes(weights=True),
            scores={str(f): group.score(f, group.after) for f in wanted},
        )
        for group in groups
    )
    told = list(notes)
    for fig in wanted:
        reasons: dict[str, list[str]] = {}
        for group in groups:
            if why := group.why_not(fig):
                reasons.setdefault(why, []).append(group.label)
        for why, labels in reasons.items():
            of = "" if len(labels) == len(groups) else f" of {', '.join(labels)}"
            told.append(f"{fig}{of} is not computable: {why}")
    best: dict[str, str] = {}
    for fig in wanted:
        means = [(m, e.label) for e in entries if not e.reference and (m := e.scores[str(fig)].mean) is not None]
        if len(means) > 1:  # a single entry is no winner
            pick = max if fig.definition.better == "higher" else min
            best[str(fig)] = pick(means, key=lambda pair: pair[0])[1]
    return Comparison(
        dataset=stream.dataset,
        protocol=stream.protocol,
        split=stream.measured,
        after=after,
        task=stream.tasks[after].name,
        spoken=stream.tasks[after].spoken,
        tasks=len(stream.tasks),
        figures=tuple(map(str, wanted)),
        entries=entries,
        best=best,
        notes=tuple(told),
    )


def comparison_table(comparison: Comparison) -> Table:
    """Table for a terminal: one line per figure, one column per entry, the best value in bold green."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    where = f"after {comparison.spoken}, {comparison.after + 1} of {comparison.tasks}"
    caption = "; ".join(comparison.notes)
    title = f"{comparison.dataset}, {comparison.protocol}: {where}"
    table = Table(title=title, caption=caption or None, box=SIMPLE_HEAD)
    table.add_column("figure", no_wrap=True)
    for entry in comparison.entries:
        label = escape(entry.label)
        table.add_column(f"[italic]{label}[/]" if entry.reference else label, justify="right", overflow="fold")
    for name in comparison.figures:
        better = "↓" if figure(name).definition.better == "lower" else "↑"
        cells = []
        for entry in comparison.entries:
            score = entry.scores[name]
            text = number(score.mean) + ("" if score.sd is None else f" ± {score.sd:.1f}")
            cells.append(f"[bold green]{text}[/]" if comparison.best.get(name) == entry.label else text)
        table.add_row(f"{escape(name)} {better}", *cells)
    kept = (NONE if e.kept_bytes is None else f"{e.kept_bytes:,}" for e in comparison.entries)
    table.add_row("bytes kept besides weights", *kept)
    return table
