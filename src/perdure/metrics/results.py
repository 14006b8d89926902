"""Result files: every figure after every task, in a table that any tool reads (CSV) and with definitions (JSON)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from perdure.errors import DataError, PerdureError
from perdure.files import write_json, write_text
from perdure.kept.ledger import LEDGER, Ledger, read_ledger
from perdure.kept.manifest import CASES, COUNTS, NUMBERS
from perdure.metrics.cases import read_cases
from perdure.metrics.confusion import read_counts
from perdure.metrics.continual import KeptCounts
from perdure.metrics.definitions import DEFINITIONS, Definition, Figure, figure, variants
from perdure.metrics.figures import case_values, evaluate, group_matrix, headline
from perdure.metrics.measured import RunResults, run_results
from perdure.metrics.numbers import read_numbers
from perdure.streams.description import DescribedStream

COLUMNS: Final = ("after_task", "task", "class_id", "class_name", "figure", "value", "n", "split")
VERSION: Final = 1


class ResultRow(NamedTuple):
    """One line of ``results.csv``; ``class_id`` is ``None`` for figures that are not of one class.

    ``split`` is what was measured: ``test`` or ``val``.
    """

    after_task: int
    task: str
    class_id: int | None
    class_name: str
    figure: str
    value: float
    n: int
    split: str = "test"


def gather_results(stream: DescribedStream, sealed: Sequence[Path]) -> RunResults:
    """What the folders of the sealed tasks of a run hold for figures.

    Raises:
        DataError: A file is damaged, or contradicts the stream.
    """
    folders = dict(enumerate(sealed))
    counts = {t: read_counts(folder / COUNTS) for t, folder in folders.items() if (folder / COUNTS).is_file()}
    cases = {t: read_cases(folder / CASES) for t, folder in folders.items() if (folder / CASES).is_file()}
    kept = {t: _kept(read_ledger(folder)) for t, folder in folders.items() if (folder / LEDGER).is_file()}
    numbers = {t: read_numbers(folder / NUMBERS) for t, folder in folders.items() if (folder / NUMBERS).is_file()}
    return run_results(stream, counts, cases=cases, kept=kept, numbers=numbers)


def _kept(ledger: Ledger) -> KeptCounts:
    tensors = [tensor for item in ledger["items"] if item["kind"] == "weights" for tensor in item["tensors"]]
    # whole numbers, such as how many batches a normalisation layer has seen, are no parameters
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors if "float" in tensor["dtype"])
    return KeptCounts(parameters, any(item["kind"] in ("exemplars", "synthetic") for item in ledger["items"]))


def results_rows(results: RunResults) -> list[ResultRow]:
    """All figures that exist after each measured task: first those of the model, then those of each class."""
    stream = results.stream
    of_model = [fig for d in DEFINITIONS.values() if d.scope != "class" for fig in _variants(d, stream)]
    of_cases = [fig for fig in of_model if fig.definition.scope == "case"]
    of_class = [d.name for d in DEFINITIONS.values() if d.scope == "class" and stream.kind in d.kinds]
    names = stream.names
    rows: list[ResultRow] = []
    for t, counts in results.counts.items():
        task = stream.tasks[t].name
        for fig in of_model:
            value, n = evaluate(fig, results, t)
            if value is not None:
                rows.append(ResultRow(t, task, None, "", str(fig), value, n, stream.measured))
        by_class = {str(fig): case_values(fig, results, t) for fig in of_cases}
        by_class |= {name: dict(results.class_values(name, t).items()) for name in of_class}
        for label in counts.labels:
            for name, values in by_class.items():
                value, n = values[label]
                if value is not None:
                    called = names.get(label, str(label))
                    rows.append(ResultRow(t, task, label, called, name, value, n, stream.measured))
    return rows


def _variants(definition: Definition, stream: DescribedStream) -> list[Figure]:
    return variants(definition, stream.kind, stream.tolerance)


def not_computable(results: RunResults) -> dict[str, dict[str, str]]:
    """Why figures do not exist after each measured task, by task and full name, where more can be said than that."""
    figures = [fig for d in DEFINITIONS.values() if d.scope != "class" for fig in _variants(d, results.stream)]
    said = {str(t): {str(fig): evaluate(fig, results, t).why for fig in figures} for t in results.counts}
    return {t: {name: why for name, why in reasons.items() if why} for t, reasons in said.items()}


def results_document(results: RunResults, rows: Sequence[ResultRow]) -> dict[str, object]:
    """Content of ``results.json``: the rows, R[t][j], the headline figures' names and every definition used.

    R[t][j] stands under ``group_miou``, in classification under ``group_accuracy``.
    """
    stream = results.stream
    of = "accuracy" if stream.kind == "classification" else "miou"
    figures: dict[str, dict[str, str]] = {}
    for row in rows:
        fig = figure(row.figure)
        d = fig.definition
        figures[row.figure] = {"meaning": fig.meaning, "unit": d.unit, "better": d.better, "source": d.source}
    return {  # rows last: a reader who opens the file sees the definitions first
        "version": VERSION,
        "dataset": stream.dataset,
        "protocol": stream.protocol,
        "split": stream.measured,
        "tasks": [t.name for t in stream.tasks],
        "measured": list(results.counts),
        "headline": headline(stream),
        f"group_{of}": {str(t): row for t, row in group_matrix(results, of).items()},
        "figures": figures,
        "not_computable": not_computable(results),
        "rows": [row._asdict() for row in rows],
    }


def write_results(run: Path, results: RunResults) -> list[ResultRow]:
    """Write ``results.csv`` and ``results.json`` into a run folder; equal results give equal bytes."""
    rows = results_rows(results)
    write_text(run / "results.csv", to_csv(rows))
    write_json(run / "results.json", results_document(results, rows))
    return rows


def to_csv(rows: Iterable[ResultRow]) -> str:
    """Text of ``results.csv``; floats are written so that reading gives the same number back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        class_id = "" if row.class_id is None else row.class_id
        figure_of = row.after_task, row.task, class_id, row.class_name, row.figure
        writer.writerow([*figure_of, repr(row.value), row.n, row.split])
    return text.getvalue()


def _present_name(name: str) -> str:
    """Name of a figure as it is now, of a row that was written when one name stood for all means over tasks."""
    old = re.fullmatch(r"accuracy\.average\[(?:of=(\w+),)?(bg=\w+),(absent=\w+)\]", name)
    if old is None:
        return name
    of, options = old[1] or "miou", old[2] if old[1] == "accuracy" else f"{old[2]},{old[3]}"
    return f"{of}.average[{options}]"


def read_results(path: Path) -> list[ResultRow]:
    """Read ``results.csv``.

    Raises:
        DataError: The file is missing, has other columns, or a line holds no finite number or no known figure.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.reader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"could not read {path}: {error}") from error
    # runs made before the split could be chosen have no column for it
    known = (COLUMNS, COLUMNS[:-1])
    if not lines or tuple(lines[0]) not in known:
        raise DataError(f"{path} is not a table of results", f"the first line must be {','.join(COLUMNS)}")
    hint = "write the file again: perdure run … --resume"
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        where = f"{path}, line {number}"
        if len(line) != len(lines[0]):
            raise DataError(f"{where}: {len(line)} columns instead of {len(lines[0])}", hint)
        line[4] = _present_name(line[4])
        after, task, class_id, class_name, name, value, n, split = (*line, "test")[: len(COLUMNS)]
        try:
            row = ResultRow(
                int(after), task, int(class_id) if class_id else None, class_name, name, float(value), int(n), split
            )
            full = str(figure(name))
        except (ValueError, PerdureError) as error:
            raise DataError(f"{where}: {str(error).splitlines()[0]}", hint) from error
        if not math.isfinite(row.value) or row.n < 0 or full != name:
            raise DataError(f"{where}: '{name}' = {value} over {n} is not a figure with a finite value", hint)
        rows.append(row)
    return rows
