"""Generated pairs of finished runs of cgr: do their masks fit their images, as a segmenter of real data sees them?

    python scripts/pairs_of_runs.py RUN [RUN ...] [--picture docs/images/pairs.png]

Pairs of a task are scored by the segmenter as it was when it had learned that task from real data, whichever later
stage made them. With ``pairs.labels=seen`` a task's first pairs have 100: their masks are what it saw. The table has
one row per task and stage, over all runs (seeds). The picture shows the first run: real images of each task, where its
data is at hand, then pairs of each stage, masks below images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from perdure.config.build import build_method, build_stream
from perdure.config.data_sets import in_order, open_sources
from perdure.config.recipe import Recipe
from perdure.errors import PerdureError, UsageError
from perdure.files import read_tensors
from perdure.labels import spread_colors
from perdure.methods.cgr import codecs
from perdure.methods.cgr.cgr import Cgr
from perdure.methods.cgr.pairs import read_manifest
from perdure.methods.cgr.sampling import agreement
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.run_folder import RunFolder
from perdure.sealing import restore_sealed
from perdure.streams.description import restore
from perdure.streams.task import Stream

COLUMNS = 14
Pixels = npt.NDArray[np.uint8]


class Stage(NamedTuple):
    """Pairs of one task that one stage made: images ``(N, C, H, W)`` uint8, codes ``(N, H, W)``, and what is known."""

    task: int
    name: str
    stage: int
    images: torch.Tensor
    codes: torch.Tensor
    passed: float
    copies: int
    dice: float


def learned(run: RunFolder, recipe: Recipe, stream: Stream, task: int) -> Cgr:
    """The method as it was when it had learned a task. Raises UsageError where it is not cgr."""
    method = build_method(recipe, stream.tasks[0].preparation, pretrained=False)
    if not isinstance(method, Cgr):
        raise UsageError(f"{run.path} is no run of the method cgr", "give folders of finished runs of cgr")
    restore_sealed(cast("Method[Options]", method), stream.tasks, run, run.sealed()[: task + 1], recipe.seed)
    return method.eval()


def stages(path: Path) -> Iterator[Stage]:
    """Every stage's pairs of every task of a run, by task."""
    run = RunFolder.existing(path)
    recipe, stream = run.recipe(), restore(run.stream())
    groups = defaultdict(list)
    for file in sorted((path / "kept").rglob("*.safetensors")):
        found = read_manifest(file)
        groups[found.task, found.stage].append((file, found))
    for (task, stage), files in sorted(groups.items()):
        method = learned(run, recipe, stream, task)
        card = method.generator.cards[task]
        read = [read_tensors(file, ("images", "labels")) for file, _ in files]
        images, codes = (torch.cat([one[key] for one in read]) for key in ("images", "labels"))
        seen = codecs.to_local(method.predict(codecs.from_bytes(images, card.ends)).labels(), card.ids)
        dice = agreement(codes.long(), seen, card.classes).mean()
        tried = sum(one.tried for _, one in files)
        passed = sum(one.sound for _, one in files) / tried
        yield Stage(task, card.name, stage, images, codes, passed, sum(m.copies for _, m in files), float(dice))


def real(path: Path, task: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The first training images of a task as pairs are stored, and their codes; ``None`` where they are not at hand."""
    run = RunFolder.existing(path)
    recipe = in_order(run.recipe())
    try:
        stream = build_stream(recipe, open_sources(recipe))[0]
    except PerdureError:
        return None
    method = learned(run, recipe, stream, task)
    card = method.generator.cards[task]
    with stream.opened(stream.tasks[task]) as opened:
        samples = opened.train()
        cases = [samples[place] for place in range(min(COLUMNS, len(samples)))]
    images = codecs.to_bytes(codecs.encode_image(torch.stack([case.image for case in cases]), card.ends))
    return images, codecs.to_local(torch.stack([case.label for case in cases]), card.ids)


def strip(images: torch.Tensor, codes: torch.Tensor) -> Pixels:
    """One row of images above their masks."""
    colors = np.array([(0, 0, 0), *spread_colors(int(codes.max()) if len(codes) else 0)], np.uint8)
    shown = images[:COLUMNS].movedim(1, -1).numpy()
    shown = np.broadcast_to(shown, (*shown.shape[:3], 3))
    masks = colors[codes[:COLUMNS].long().numpy()]
    columns = [np.concatenate(pair) for pair in zip(shown, masks, strict=True)]
    side = shown.shape[2]
    columns += [np.zeros((2 * shown.shape[1], side, 3), np.uint8)] * (COLUMNS - len(columns))
    return np.concatenate(columns, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and draw the picture if asked for."""
    parser = argparse.ArgumentParser(description="generated pairs of finished runs of cgr")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, such as one per seed")
    parser.add_argument("--picture", type=Path, help="PNG to write")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = [list(stages(path)) for path in asked.runs]
    print("| task | made after task | masks against the segmenter, Dice, % | pass the checks, % | copies |")
    print("|---|---|---|---|---|")
    for same in zip(*found, strict=True):
        dice = [100 * one.dice for one in same]
        spread = f" ± {statistics.stdev(dice):.1f}" if len(dice) > 1 else ""
        passed, copies = 100 * statistics.mean(one.passed for one in same), sum(one.copies for one in same)
        one = same[0]
        print(f"| {one.name} | {one.stage + 1} | {statistics.mean(dice):.1f}{spread} | {passed:.0f} | {copies} |")
    if asked.picture:
        rows = []
        for one in found[0]:
            if one.stage == one.task and (shown := real(asked.runs[0], one.task)):
                rows.append(strip(*shown))
            rows.append(strip(one.images, one.codes))
        whole = np.concatenate([np.pad(row, ((0, 2), (0, 0), (0, 0)), constant_values=255) for row in rows])
        factor = max(1, round(900 / whole.shape[1]))
        Image.fromarray(whole.repeat(factor, 0).repeat(factor, 1)).quantize(128).save(asked.picture, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
