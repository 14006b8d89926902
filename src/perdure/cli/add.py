"""``perdure add``: one more data set for a finished run, and what that changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perdure.adding import Addition, extended, give_up
from perdure.cli.console import open_console
from perdure.config.load import split_override
from perdure.engine.options import EngineOptions
from perdure.errors import UsageError
from perdure.experiment import run_experiment
from perdure.metrics.changes import Changes, read_changes
from perdure.run_folder import RunFolder
from perdure.sealing import publish, record
from perdure.streams.description import DescribedStream


def pairs(texts: list[str], option: str, form: str) -> dict[str, str]:
    """``A=B`` as a mapping. Raises UsageError for any other text."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"{option} '{text}' cannot be read", f"write {option} {form}")
        found[key] = value
    return found


def add(path: Path, addition: Addition, at_most: float | None, quiet: bool, allow_code: bool) -> list[str]:
    """Learn one more data set, print what it did to earlier classes; returns the classes that fell by too much."""
    run = RunFolder.existing(path)
    with run.read_alone():
        recipe = extended(run, addition, allow_code)
    learned = len(run.sealed())
    run_experiment(recipe, path, resume=True, quiet=quiet)
    if learned == len(run.sealed()) and not quiet:
        open_console(stderr=True).print(f"'{run.stream().tasks[-1].name}' was learned before", markup=False)
    stream = run.stream()
    found = read_changes(path, stream, len(stream.tasks) - 1)
    if found is None:
        return []
    if not quiet:
        show(found, stream, open_console())
    if at_most is not None and (unknown := [c for c in found.classes if c.fall is None]):
        names = ", ".join(stream.space.name(c.class_id) for c in unknown)
        open_console(stderr=True).print(f"not held against --at-most, for nothing shows them: {names}", markup=False)
    fallen = [c for c in found.classes if at_most is not None and c.fall is not None and c.fall > at_most]
    return [f"{stream.space.name(c.class_id)} ({c.fall:.1f} of {c.fell_in})" for c in fallen]


def undone(path: Path, overrides: Sequence[str]) -> str:
    """Take an unfinished data set out of a run; says what was done. Of the recipe ``engine.working`` alone matters."""
    run = RunFolder.existing(path)
    given = dict(map(split_override, overrides))
    working = EngineOptions(working=given.pop("engine.working", None)).working
    if given:
        raise UsageError(f"--give-up takes no {next(iter(given))}", "leave it out; only engine.working=DIR is needed")
    name = give_up(run, working)
    if not name:
        return f"every data set of {path} is learned: nothing was taken out"
    record(run)
    publish(run)
    return f"'{name}' was taken out of {path}; the model is that of the data sets before it"


def show(found: Changes, stream: DescribedStream, console: Console) -> None:
    """A table of earlier classes: before and after on their own test cases, and how far outputs moved on new ones."""
    new = stream.tasks[-1].called
    here = any(c.after is not None for c in found.classes)
    own = ["before", "after", "change"] if here else []
    shown = any(c.as_it_was is not None for c in found.classes)
    labelled = [f"on {escape(new)}: before", "after"] if shown else []
    table = Table(
        "earlier class", *own, *labelled, f"{escape(new)}: Dice of old and new output", title="Earlier classes, Dice"
    )
    for c in found.classes:
        cells = [_number(c.before), _number(c.after), _change(c.before, c.after)] if here else []
        cells += [_number(c.as_it_was), _number(c.as_it_is)] if shown else []
        table.add_row(escape(stream.space.name(c.class_id)), *cells, _number(c.agreement))
    console.print(table)
    if found.changed is not None:
        unit = "voxels" if stream.tasks[-1].preparation.get("kind") == "volume3d" else "pixels"
        console.print(
            f"{found.changed:.2f} % of the {unit} of the new test cases have another earlier label (or background) now",
            highlight=False,
        )
    for since in dict.fromkeys(c.since for c in found.classes if c.since and c.before is not None):
        names = escape(", ".join(stream.space.name(c.class_id) for c in found.classes if c.since == since))
        console.print(
            f"before of {names}: measured after {escape(', '.join(since))}; the test cases were not at hand since then",
            highlight=False,
            soft_wrap=True,
        )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _change(before: float | None, after: float | None) -> str:
    return "–" if before is None or after is None else f"{after - before:+.1f}"
