"""Run folders made by hand: scenes of numbered shapes, and methods that forget more or less."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from perdure.files import write_json, write_text
from perdure.kept.items import Kept
from perdure.kept.ledger import Entry, preview_entry, write_ledger
from perdure.kept.method_state import write_kept
from perdure.labels import IGNORE, label_space
from perdure.metrics.confusion import ConfusionMatrix, write_counts
from perdure.metrics.measured import run_results
from perdure.metrics.results import write_results
from perdure.report.samples import write_class_samples, write_samples
from perdure.streams.description import parse_stream

GROUPS = [[1, 2, 3, 4], [5, 6], [7, 8], [9, 10]]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LOSS = {"finetune": 0.9, "star": 0.12, "joint": 0.0}
SIDE = 64

MakeRun = Callable[..., Path]

REST = {"recurs": False, "preparation": {"kind": "as_is"}}


def describe(
    merged: bool = False, background: str | None = "background", patients: bool = False, measured: str = "test"
) -> dict[str, Any]:
    """Content of ``stream.json`` of ten classes in four tasks, or of the merged stream."""
    classes = [{"id": c.id, "name": c.name, "kind": c.kind, "color": list(c.color)} for c in label_space(NAMES).classes]
    tasks, old = [], []
    for index, new in enumerate([[c for g in GROUPS for c in g]] if merged else GROUPS):
        name = "all" if merged else f"{NAMES[new[0] - 1]}-{NAMES[new[-1] - 1]}"
        tasks.append({"index": index, "name": name, "new": new, "old": old,
                      "annotated": sorted(new), **REST})  # fmt: skip
        old = old + new
    protocol = "class-incremental 4-2 overlap" + (", merged" if merged else "")
    return {"protocol": protocol, "dataset": "digits", "background": background, "patients": patients,
            "measured": measured, "classes": classes, "tasks": tasks, "groups": GROUPS}  # fmt: skip


def scene(number: int) -> tuple[torch.Tensor, np.ndarray, dict[int, np.ndarray]]:
    """Image ``(3, S, S)`` in 0..1, labels ``(S, S)``, and the region of each class in it."""
    rng = np.random.default_rng(number)
    yy, xx = np.mgrid[:SIDE, :SIDE]
    image = rng.normal(0.45, 0.05, (SIDE, SIDE, 3)) + 0.12 * np.sin(xx / 7 + number)[..., None]
    labels = np.zeros((SIDE, SIDE), np.int64)
    regions = {}
    for c in rng.choice(np.arange(1, 11), 5, replace=False):
        cy, cx, r = [*rng.integers(10, SIDE - 10, 2).tolist(), rng.integers(6, 13)]
        inside = (yy - cy) ** 2 + ((xx - cx) * (1 + c / 8)) ** 2 < r**2
        inside &= (np.hypot(yy - cy, xx - cx) > r / 2.4) if c % 2 else True
        image[inside] = np.array([0.9 - 0.06 * c, 0.35 + 0.05 * c, (c % 3) / 3]) + rng.normal(
            0, 0.04, (inside.sum(), 3)
        )
        labels[inside] = c
    labels[:2] = IGNORE
    for c in range(1, 11):
        regions[c] = labels == c
    return torch.tensor(image.clip(0, 1).transpose(2, 0, 1), dtype=torch.float32), labels, regions


def guess(
    labels: np.ndarray, regions: dict[int, np.ndarray], seen: dict[int, int], loss: float, seed: int
) -> np.ndarray:
    """Prediction of a model that loses ``loss`` of a class with every task since it was learned."""
    rng = np.random.default_rng(seed)
    predicted = np.where((labels == IGNORE) | ~np.isin(labels, list(seen)), 0, labels)
    for c, age in seen.items():
        gone = regions[c] & (rng.random(labels.shape) < 0.08)
        if age and regions[c].any():
            rows = np.where(regions[c].any(1))[0]
            gone |= regions[c] & (
                np.arange(SIDE)[:, None] < rows[0] + len(rows) * min(1, loss * age * rng.uniform(0.7, 1.2))
            )
        predicted[gone] = 0
    return predicted


def entry(folder: Path, name: str, kind: str, file: str, size: int, per_class: int | None) -> Entry:
    """Write a file and return its ledger entry."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    made_from = f"training data of this and all earlier tasks ({name})"
    about = {"name": name, "kind": kind, "bytes": size, "made_from": made_from, "per_class_bytes": per_class}
    return preview_entry(folder, path, patients=False) | about  # type: ignore[return-value]


def build(path: Path, method: str = "star", seed: int = 1, sealed: int = 4, **stream: Any) -> Path:
    """Write a run folder of which the first ``sealed`` tasks are done."""
    described = describe(merged=method == "joint", **stream)
    parsed = parse_stream(described)
    write_json(path / "stream.json", described)
    write_json(
        path / "environment.json", {"perdure": "0.1.0", "python": "3.11", "gpu": None, "hostname": "secret-host"}
    )
    recipe = {"name": "demo", "seed": seed, "data": {"name": "digits", "root": "/secret/place/digits"},
              "method": {"name": method}, "training": {"epochs": 3}}  # fmt: skip
    write_text(path / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
    scenes = [scene(n) for n in range(12)]
    counts = {}
    for task in parsed.tasks[:sealed]:
        folder = path / "tasks" / f"{task.index:02d}-{task.name}"
        born = {c: t.index for t in parsed.tasks for c in t.new}
        ages = {c: task.index - born[c] for c in task.seen}
        total = ConfusionMatrix.empty(task.seen)
        for n, (image, labels, regions) in enumerate(scenes):
            predicted = guess(labels, regions, ages, LOSS[method], seed * 1000 + n)
            total.update(torch.from_numpy(labels[None]), torch.from_numpy(predicted[None]))
            if n < 3 and not parsed.patients:
                write_samples(folder / "samples", f"{n:05d}", image, labels, predicted, parsed.space.palette())
        write_counts(folder / "counts.json", {"all": total})
        counts[task.index] = {"all": total}
        items = [entry(folder, "weights", "weights", "weights.safetensors", 64_000 + 257 * len(task.seen), None)]
        if method == "star":
            size = 2060 * len(task.seen) + 4
            items.append(entry(folder, "statistics", "statistics", "kept/statistics.safetensors", size, 2060))
        for file in sorted((folder / "samples").glob("*.png")):
            items.append(preview_entry(folder, file, parsed.patients))
        write_ledger(folder, task.name, items, parsed.patients)
        write_json(folder / "done", {"task": task.index})
    write_results(path, run_results(parsed, counts))
    return path


def glyph(c: int, rng: np.random.Generator, noise: float = 0.08, side: int = 16) -> np.ndarray:
    """Grey picture ``(1, S, S)`` float in 0..1 of a class, a little different each time."""
    yy, xx = np.mgrid[:side, :side] / side + rng.normal(0, 0.02, 2)[:, None, None]
    wave = np.sin(9 * xx * (c % 4) + 2 * c) * np.cos(7 * yy * (c % 3) + c)
    return (0.5 + 0.45 * wave + rng.normal(0, noise, (side, side))).clip(0, 1)[None]


def dreams(seen: tuple[int, ...], copies: bool) -> dict[str, torch.Tensor]:
    """What a method with synthetic images keeps: means, a few pictures, distances, weights."""
    rng = np.random.default_rng(5)
    means = np.stack([glyph(c, rng, 0.01) for c in seen])
    made = np.stack([[glyph(c, rng, 0.2) for _ in range(4)] for c in seen])
    near, real = rng.uniform(0.12, 0.3, (len(seen), 30)), rng.uniform(0.08, 0.2, (len(seen), 20))
    near[:, 25:], near[1] = np.nan, np.nan
    if copies:
        near[2, 7] = 0.01
    pictures = {"memory.means": means, "memory.preview": made}
    state = {k: torch.from_numpy((255 * v).round().astype(np.uint8)) for k, v in pictures.items()}
    rows = {"memory.impressions": near, "memory.reference": real}
    return state | {k: torch.from_numpy(v).float() for k, v in rows.items()} | {"network.weight": torch.ones(500)}


DREAMS = (
    Kept("means", "statistics", ("memory.means",), "mean over all training images of the class", True, "images",
         from_images=40),
    Kept("distances", "statistics", ("memory.impressions", "memory.reference"), "distances", False, "distances"),
    Kept("dreamed", "preview", ("memory.preview",), "made up by the network", False, "images", from_images=40),
)  # fmt: skip


def build_classes(
    path: Path, method: str = "star", seed: int = 1, sealed: int = 4, copies: bool = False, **changes: Any
) -> Path:
    """Write a run folder of a classification run; ``changes`` go into ``stream.json``."""
    described = describe(merged=method == "joint", background=None) | {"kind": "classification", **changes}
    parsed = parse_stream(described)
    write_json(path / "stream.json", described)
    write_text(path / "recipe.yaml", yaml.safe_dump({"seed": seed, "method": {"name": method}}))
    born = {c: t.index for t in parsed.tasks for c in t.new}
    counts = {}
    for task in parsed.tasks[:sealed]:
        folder = path / "tasks" / f"{task.index:02d}-{task.name}"
        rng = np.random.default_rng(seed)
        total = ConfusionMatrix.empty(task.seen)
        for c in task.seen:
            wrong = rng.random(40 + 10 * c) < 0.05 + LOSS[method] * 0.3 * (task.index - born[c])
            guesses = np.where(wrong, rng.choice(task.new, len(wrong)), c)
            total.update(torch.full((len(wrong),), c), torch.from_numpy(guesses))
        write_counts(folder / "counts.json", {"test": total})
        counts[task.index] = {"test": total}
        state = dreams(task.seen, copies) if method == "star" else {"network.weight": torch.ones(500)}
        entries = write_kept(folder, state, DREAMS if method == "star" else (), len(task.seen))
        for n, c in enumerate((1, 6, 10)):
            if parsed.patients:
                continue
            image = torch.from_numpy(glyph(c, np.random.default_rng(n))).float()
            said = c if c in task.seen and (c, task.index) != (1, 3) else task.seen[-1]
            files = write_class_samples(folder / "samples", f"{n:05d}", image, c, said)
            entries += [preview_entry(folder, file, parsed.patients) for file in files]
        write_ledger(folder, task.name, entries, parsed.patients)
        write_json(folder / "done", {"task": task.index})
    write_results(path, run_results(parsed, counts))
    return path


VOID = {"meta", "link", "img", "br", "wbr", "input", "hr"}


class Checker(HTMLParser):
    """Collects tags, addresses and ids; every opened element must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: Counter[str] = Counter()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs) -> None:
        self.tags[tag] += 1
        given = dict(attrs)
        if len(given) != len(attrs):
            self.wrong.append(f"{tag} has an attribute twice")
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[k] for k in ("src", "href", "action", "data", "srcset") if k in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


def read_page(path: Path) -> str:
    """Assert that a page is well-formed and needs nothing from outside; return its text."""
    page = path.read_text(encoding="utf-8")
    found = Checker(page)
    assert page.lstrip().startswith("<!DOCTYPE html>")
    assert not found.wrong, found.wrong
    assert not found.open, found.open
    assert found.tags["script"] == 0
    assert [i for i, n in Counter(found.ids).items() if n > 1] == []
    for address in found.addresses:
        assert address.startswith(("data:", "#")), address
        assert address[0] != "#" or address[1:] in found.ids, f"{address} leads nowhere"
    assert set(re.findall(r"url\(#([\w-]+)\)", page)) <= set(found.ids)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "nan" not in re.findall(r">([^<]*)<", page.lower())
    return page


@pytest.fixture
def check_page() -> Callable[[Path], str]:
    """Checks a page and returns its text."""
    return read_page


@pytest.fixture
def page_markup() -> type[Checker]:
    """Parser that notes what is wrong with some markup."""
    return Checker


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Factory ``make_run(name, method=, seed=, sealed=, **stream)`` of run folders."""

    def make(name: str = "run", **options: Any) -> Path:
        return build(tmp_path / name, **options)

    return make


@pytest.fixture
def make_class_run(tmp_path: Path) -> MakeRun:
    """Factory ``make_class_run(name, method=, seed=, sealed=, copies=, **stream)`` of classification runs."""

    def make(name: str = "run", **options: Any) -> Path:
        return build_classes(tmp_path / name, **options)

    return make
