"""Result files: every figure after every task, in a table that any tool reads (CSV) and with definitions (JSON)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from perdure.errors import DataError, PerdureError
from perdure.files import write_json, write_text
from perdure.metrics.confusion import ConfusionMatrix
from perdure.metrics.definitions import DEFINITIONS, figure, variants
from perdure.metrics.figures import RunResults, class_values, evaluate, group_matrix, headline, run_results
from perdure.streams.description import DescribedStream

COLUMNS: Final = ("after_task", "task", "class_id", "class_name", "figure", "value", "n")
VERSION: Final = 1


class ResultRow(NamedTuple):
    """One line of ``results.csv``; ``class_id`` is ``None`` for figures that are not of one class."""

    after_task: int
    task: str
    class_id: int | None
    class_name: str
    figure: str
    value: float
    n: int


def results_rows(
    stream: DescribedStream, counts_by_task: Mapping[int, Mapping[str, ConfusionMatrix]]
) -> list[ResultRow]:
    """All figures that exist after each measured task: first those of the model, then those of each class."""
    results = run_results(stream, counts_by_task)
    rows: list[ResultRow] = []
    for t in results.counts:
        rows += _figure_rows(results, t)
        rows += _class_rows(results, t)
    return rows


def _figure_rows(results: RunResults, t: int) -> list[ResultRow]:
    name = results.stream.tasks[t].name
    kind = results.stream.kind
    figures = [f for d in DEFINITIONS.values() if d.scope != "class" for f in variants(d, kind)]
    values = [(str(f), evaluate(f, results, t)) for f in figures]
    return [ResultRow(t, name, None, "", f, v.value, v.n) for f, v in values if v.value is not None]


def _class_rows(results: RunResults, t: int) -> list[ResultRow]:
    counts, names = results.counts[t], results.stream.names
    kind = results.stream.kind
    figures = [d.name for d in DEFINITIONS.values() if d.scope == "class" and kind in d.kinds]
    values = {f: class_values(f, counts) for f in figures}
    task = results.stream.tasks[t].name
    return [
        ResultRow(t, task, label, names.get(label, str(label)), f, value, n)
        for label in counts.labels
        for f in figures
        for value, n in (values[f][label],)
        if value is not None
    ]


def results_document(
    stream: DescribedStream, counts_by_task: Mapping[int, Mapping[str, ConfusionMatrix]], rows: Sequence[ResultRow]
) -> dict[str, Any]:
    """Content of ``results.json``: the rows, R[t][j], the headline figures' names and every definition used.

    R[t][j] stands under ``group_miou``, in classification under ``group_accuracy``.
    """
    results = run_results(stream, counts_by_task)
    used = dict.fromkeys(row.figure for row in rows)
    of = "accuracy" if stream.kind == "classification" else "miou"
    matrix = group_matrix(results, of)
    return {
        "version": VERSION,
        "dataset": stream.dataset,
        "protocol": stream.protocol,
        "tasks": [t.name for t in stream.tasks],
        "measured": list(results.counts),
        "headline": headline(stream),
        f"group_{of}": {str(t): matrix[t] for t in matrix},
        "figures": {name: _definition(name) for name in used},
        "rows": [row._asdict() for row in rows],
    }


def _definition(name: str) -> dict[str, str]:
    fig = figure(name)
    d = fig.definition
    return {"meaning": fig.meaning, "unit": d.unit, "better": d.better, "source": d.source}


def write_results(
    run: Path, stream: DescribedStream, counts_by_task: Mapping[int, Mapping[str, ConfusionMatrix]]
) -> list[ResultRow]:
    """Write ``results.csv`` and ``results.json`` into a run folder; equal counts give equal bytes."""
    rows = results_rows(stream, counts_by_task)
    write_text(run / "results.csv", to_csv(rows))
    write_json(run / "results.json", results_document(stream, counts_by_task, rows))
    return rows


def to_csv(rows: Iterable[ResultRow]) -> str:
    """Text of ``results.csv``; floats are written so that reading gives the same number back."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        class_id = "" if row.class_id is None else row.class_id
        writer.writerow([row.after_task, row.task, class_id, row.class_name, row.figure, repr(row.value), row.n])
    return text.getvalue()


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
    if not lines or tuple(lines[0]) != COLUMNS:
        raise DataError(f"{path} is not a table of results", f"the first line must be {','.join(COLUMNS)}")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines[1:], start=2)]


def _parse(line: list[str], where: str) -> ResultRow:
    hint = "write the file again: perdure report DIR"
    if len(line) != len(COLUMNS):
        raise DataError(f"{where}: {len(line)} columns instead of {len(COLUMNS)}", hint)
    after, task, class_id, class_name, name, value, n = line
    try:
        row = ResultRow(int(after), task, int(class_id) if class_id else None, class_name, name, float(value), int(n))
        full = str(figure(name))
    except (ValueError, PerdureError) as error:
        raise DataError(f"{where}: {str(error).splitlines()[0]}", hint) from error
    if not math.isfinite(row.value) or row.n < 0 or full != name:
        raise DataError(f"{where}: '{name}' = {value} over {n} is not a figure with a finite value", hint)
    return row
