"""A run folder as pages see it: read once, checked, complete or only partly done."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from perdure.errors import DataError, RunError
from perdure.files import read_json
from perdure.kept.ledger import LEDGER, Ledger, read_ledger, sealed_folders
from perdure.metrics.confusion import read_counts
from perdure.metrics.figures import RunResults, run_results
from perdure.report.kept_items import ShownItem, shown_items
from perdure.report.samples import Sample, read_samples
from perdure.streams.description import DescribedStream, read_stream

_ABSOLUTE: Final = re.compile(r"(?<![\w:./~])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:]+[/\\])*([^\s/\\'\",;:]*)")
_PRIVATE: Final = frozenset({"host", "hostname", "user", "username", "cwd", "home"})


@dataclass(frozen=True)
class RunData:
    """What pages show of a run.

    Args:
        name: Name of the folder.
        stream: Its classes and tasks.
        results: Counts after each measured task.
        sealed: Number of tasks that are done.
        ledgers: Content of ``ledger.json`` by task.
        samples: Test samples by task and name; empty where none may be shown.
        shown: Kept items that the report shows, by task; without raw images of patients, unless they may be shown.
        recipe: The resolved recipe.
        environment: Versions and machine.
    """

    name: str
    stream: DescribedStream
    results: RunResults
    sealed: int
    ledgers: Mapping[int, Ledger]
    samples: Mapping[int, dict[str, Sample]]
    shown: Mapping[int, tuple[ShownItem, ...]]
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def method(self) -> str:
        """Name of the method."""
        section = self.recipe.get("method", "unknown")
        return str(section.get("name", "unknown") if isinstance(section, dict) else section)

    @property
    def seed(self) -> int | None:
        """Seed of the run."""
        seed = self.recipe.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def finished(self) -> bool:
        """True where all tasks are sealed."""
        return self.sealed == len(self.stream.tasks)

    @property
    def settings(self) -> str:
        """The recipe without name and seed as text: equal for runs that differ by seed only."""
        kept = {k: v for k, v in self.recipe.items() if k not in ("seed", "name", "about", "report")}
        return json.dumps(kept, sort_keys=True, default=str)


def load_run(path: Path) -> RunData:
    """Read a run folder; tasks that are not sealed yet are left out.

    Raises:
        RunError: The folder is not a run.
        DataError: A file of it is missing or damaged.
    """
    if not (path / "stream.json").is_file() or not (path / "recipe.yaml").is_file():
        raise RunError(f"{path} is not a run folder", "give a folder that `perdure run` made (it holds recipe.yaml)")
    stream = read_stream(path / "stream.json")
    folders = dict(enumerate(sealed_folders(path, [task.name for task in stream.tasks])))
    recipe = _read_recipe(path / "recipe.yaml")
    counts = {t: read_counts(f / "counts.json") for t, f in folders.items() if (f / "counts.json").is_file()}
    environment = read_json(path / "environment.json") if (path / "environment.json").is_file() else {}
    shown = not stream.patients or bool((recipe.get("report") or {}).get("patient_samples"))
    ledgers = {t: read_ledger(f) for t, f in folders.items() if (f / LEDGER).is_file()}
    return RunData(
        name=path.resolve().name,
        stream=stream,
        results=run_results(stream, counts),
        sealed=len(folders),
        ledgers=ledgers,
        samples={t: read_samples(f / "samples") for t, f in folders.items()} if shown else {},
        shown={
            t: tuple(i for i in shown_items(folders[t], ledger) if shown or not i.raw) for t, ledger in ledgers.items()
        },
        recipe=without_places(recipe),
        environment=without_places(environment),
    )


def without_places(value: Any) -> Any:
    """Copy of plain values in which absolute paths keep their last part only and names of hosts and users are gone."""
    if isinstance(value, dict):
        return {k: without_places(v) for k, v in value.items() if str(k).lower() not in _PRIVATE}
    if isinstance(value, list):
        return [without_places(v) for v in value]
    return _ABSOLUTE.sub(lambda m: f"…/{m[1]}", value) if isinstance(value, str) else value


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"could not read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise DataError(f"{path} is not a recipe: it must be a mapping of keys")
    return recipe
