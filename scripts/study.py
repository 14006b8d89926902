"""Run a study - one recipe, some variants, some seeds - and write its results page.

python scripts/study.py STUDY.yaml --out runs/NAME [--jobs 2] [--page docs/results/NAME.md]

A study file names a recipe, overrides for all runs, seeds, and variants with their own overrides; with `reference`,
one of the variants, the page also shows how far the others are from it on the same seeds. Runs that are finished are
left alone and stopped ones go on, so the same command can be given again. Every run gets one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from perdure.config.load import read_raw
from perdure.files import write_text
from perdure.metrics.results import read_results
from perdure.run_folder import RunFolder


def commands(study: Mapping[str, Any], root: list[str], out: Path) -> dict[tuple[str, int], list[str]]:
    """Words of the command of every run, by variant and seed."""
    common = [*study.get("overrides", ()), *root, "engine.threads=1", "engine.device=cpu", "engine.trackers=[]"]
    return {
        (name, seed): ["run", study["recipe"], f"seed={seed}", *common, *special, "--out", str(out / f"{name}-{seed}")]
        for seed in study["seeds"]
        for name, special in study["variants"].items()
    }


def run(words: Sequence[str]) -> None:
    """Run one command unless its run is finished; stop the study where it fails."""
    folder = Path(words[-1])
    there = RunFolder(folder)
    if (folder / "stream.json").exists() and len(there.sealed()) == len(there.stream().tasks):
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    line = [sys.executable, "-m", "perdure", *words, "--quiet", "--resume"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {folder.name} {done.stderr.strip()[-400:]}", flush=True)
    if done.returncode:
        raise SystemExit(1)


def _root_key(recipe: str) -> str:
    """Key of the folder of the data: that of one data set, or the one that the data sets of a stream start from."""
    stream = read_raw(recipe).get("stream")
    return "stream.root" if isinstance(stream, dict) and stream.get("kind") == "data_sets" else "data.root"


def figures(folder: Path, names: Sequence[str]) -> list[float | None]:
    """Values of figures after the last task of a run."""
    rows = read_results(folder / "results.csv")
    last = max(row.after_task for row in rows)
    found = {row.figure: row.value for row in rows if row.after_task == last and row.class_id is None}
    return [found.get(name) for name in names]


def by_class(folder: Path, figure: str) -> dict[str, float | None]:
    """Value of a figure of each class after the last task of a run, by the class's name; background is left out."""
    rows = read_results(folder / "results.csv")
    last = max(row.after_task for row in rows)
    return {
        row.class_name: row.value
        for row in rows
        if row.figure == figure and row.after_task == last and row.class_id and row.class_name
    }


def page(study: Mapping[str, Any], out: Path) -> str:
    """Markdown with the table, the notes, and how each line was made."""
    names = list(study["figures"])
    seeds = study["seeds"]
    lines = [f"# {study['title']}", "", *study.get("about", "").strip().splitlines(), ""]
    one = f"After the last task, one seed ({seeds[0]})."
    several = f"After the last task, mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
    lines += [
        one if len(seeds) == 1 else several,
        *_measured(out),
        "",
    ]
    found = {variant: [figures(out / f"{variant}-{seed}", names) for seed in seeds] for variant in study["variants"]}
    lines += _table(names, found)
    asked = study.get("by_class", ())
    for per_class in [asked] if isinstance(asked, str) else asked:
        lines += ["", f"`{per_class}` of each class.", ""]
        values = {v: [by_class(out / f"{v}-{seed}", per_class) for seed in seeds] for v in study["variants"]}
        names_of = list(dict.fromkeys(name for runs in values.values() for name in runs[0]))
        lines += _table(
            names_of, {v: [[run.get(name) for name in names_of] for run in runs] for v, runs in values.items()}
        )
    if reference := study.get("reference"):
        # per seed first: classes that every variant finds hard for one seed then leave the comparison
        paired = {
            variant: [list(map(_minus, one, other)) for one, other in zip(runs, found[reference], strict=True)]
            for variant, runs in found.items()
            if variant != reference
        }
        lines += [
            "",
            f"Paired differences from {reference}, on the same seeds (points).",
            "",
            *_table(names, paired, "+"),
        ]
    lines += ["", "| | differs from the recipe in |", "|---|---|"]
    lines += [
        f"| {name} | {' '.join(f'`{w}`' for w in special) or '–'} |" for name, special in study["variants"].items()
    ]
    folder = [f"{_root_key(study['recipe'])}=DIR"] if study.get("root") else []
    example = shlex.join(["perdure", "run", study["recipe"], *folder, "seed=1", *study.get("overrides", ())])
    whole = f"python scripts/study.py {study['file']} --out runs{' --root DIR' if folder else ''}"
    lines += ["", f"Made with `{whole}`; a single run is `{example}`.", ""]
    lines += [*(f"- {note}" for note in study.get("notes", ())), ""]
    environment = json.loads(
        (out / f"{next(iter(study['variants']))}-{seeds[0]}" / "environment.json").read_text("utf-8")
    )
    versions = ", ".join(f"{key} {environment[key]}" for key in ("perdure", "torch", "python"))
    return "\n".join([*lines, f"Environment: {versions}; one CPU thread a run, no GPU.", ""])


def _table(names: Sequence[str], found: Mapping[str, Sequence[Sequence[float | None]]], sign: str = "") -> list[str]:
    """Lines of a table of mean ± standard deviation over seeds: a row per variant, a column per figure."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    for variant, runs in found.items():
        lines.append(f"| {variant} | " + " | ".join(_cell(column, sign) for column in zip(*runs, strict=True)) + " |")
    return lines


def _measured(out: Path) -> list[str]:
    """Say that figures are of the validation set, where they are: no page may take them for test figures."""
    splits = {row.split for table in out.glob("*/results.csv") for row in read_results(table)[:1]}
    if len(splits) > 1:
        raise SystemExit("some runs were measured on test and some on validation images (evaluate.split)")
    said = "Figures of the **validation** set (`evaluate.split: val`), for choosing settings; no test figures."
    return [said] if "val" in splits else []


def _cell(values: Sequence[float | None], sign: str) -> str:
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{sign}.1f}{spread}"


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def main() -> None:
    """Parse the arguments, run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", help="folder of the data (data.root)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    study = yaml.safe_load(asked.study.read_text(encoding="utf-8")) | {
        "file": asked.study.as_posix(),
        "root": asked.root,
    }
    root = [f"{_root_key(study['recipe'])}={asked.root}"] if asked.root else []
    with ThreadPoolExecutor(asked.jobs) as pool:
        list(pool.map(run, commands(study, root, asked.out).values()))
    if asked.page:
        write_text(asked.page, page(study, asked.out))


if __name__ == "__main__":
    main()
