"""Time of STAR's losses, forward and backward, against a straightforward implementation that loops over classes.

    python benchmarks/star_losses.py [--device cuda] [--repeats 5] [--json FILE]

The network is left out: the "images" are feature maps. Both implementations get the same tensors; the loss values
are compared first, with noise-free statistics so that they must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.methods.options import Setup, TrainingOptions
from perdure.methods.star import Star
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task

WIDTH, STRIDE = 256, 16


class Case(NamedTuple):
    """Shape of one comparison: classes, images, crop and replayed vectors an iteration."""

    name: str
    old: int
    new: int
    images: int
    crop: int
    replayed: int


# Replayed vectors: the published counts, scaled to the images of a batch (1.2, 4.9 and 1.9 times the grid cells).
CASES = [
    Case("VOC 15-1, first task", 0, 15, 2, 512, 0),
    Case("VOC 15-5, second task", 15, 5, 4, 512, 5_000),
    Case("VOC 15-1, second task", 15, 1, 4, 512, 20_000),
    Case("ADE 100-50, first task", 0, 100, 1, 512, 0),
    Case("ADE 100-50, second task", 100, 50, 2, 512, 4_000),
]


def build(case: Case, device: torch.device) -> tuple[Star, Batch]:
    """A STAR whose network passes features through, in the middle of the case's task, and a batch."""
    torch.manual_seed(0)

    def network() -> Segmenter:
        return Segmenter(nn.Identity(), WIDTH, STRIDE, 2, multiple=(1, 1))

    star = Star(Setup(Star.Options(), TrainingOptions(), network))
    old = tuple(range(1, 1 + case.old))
    new = tuple(range(1 + case.old, 1 + case.old + case.new))
    if old:
        star.begin(Task(0, "old", old, (), frozenset(old)))
        star.prototypes = F.normalize(torch.rand(case.old, WIDTH), dim=1)
        star.spreads = 0.03 * torch.rand(case.old, WIDTH)
        star.norms = torch.tensor([[8.0, 1.0]]).repeat(case.old, 1)
        nn.init.constant_(star.network.classifiers[0].bias, -3.0)  # the old network is unsure in places
    star.begin(Task(1 if old else 0, "new", new, old, frozenset(new)))
    if old:
        star.replay_amounts = torch.full((case.old,), case.replayed / case.old)
        star.repeat_factor = torch.tensor(20.0)
    cells = case.crop // STRIDE
    features = torch.randn(case.images, WIDTH, cells, cells).relu().requires_grad_()
    blocks = torch.randint(0, 1 + case.old + case.new, (case.images, 8, 8))
    labels = blocks.repeat_interleave(case.crop // 8, 1).repeat_interleave(case.crop // 8, 2)
    labels[labels <= case.old] = 0
    labels[:, :: case.crop // 4] = 255
    star.to(device)
    return star, Batch(features.detach().to(device).requires_grad_(), labels.to(device), ())


def straightforward(star: Star, batch: Batch) -> dict[str, Tensor]:
    """The specification, written down class by class at full resolution."""
    features, labels, size = batch.images, batch.labels, batch.labels.shape[1:]
    classifier, bce = star.network.classifiers[-1], F.binary_cross_entropy_with_logits
    weight = torch.tensor(star.training_options.pos_weight, device=labels.device)
    logits = classifier(features)
    full = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    current = torch.stack([bce(full[:, k], (labels == c).float(), pos_weight=weight) for k, c in enumerate(star.new)])
    if not star.old:
        return {"current": current.sum()}
    with torch.no_grad():
        (old,) = star._old_network
        old_features = old.features(features)
        old_full = F.interpolate(old.classify(old_features), size, mode="bilinear", align_corners=False)
        best, channel = old_full.max(1)
        pseudo_labels = torch.where(best > star.options.threshold, channel + 1, 0)
        drawn = []
        for c, amount in enumerate(star.replay_amounts.tolist()):
            noise = torch.randn(round(amount), WIDTH, device=labels.device) * star.spreads[c]
            norm = star.norms[c, 0] + star.norms[c, 1] * torch.randn(round(amount), 1, device=labels.device)
            drawn.append((star.prototypes[c] + noise) * norm)
        replayed = torch.cat(drawn).t()[None, :, :, None]
    zeros = classifier(replayed)
    grid = (slice(None), slice(8, None, STRIDE), slice(8, None, STRIDE))
    region = (labels[grid] == 0) & (pseudo_labels[grid] == 0)
    ground = classifier(features.movedim(1, -1)[region].t()[None, :, :, None])
    cells = region.numel()
    w_rep, w_bg = replayed.shape[2] / cells, star.repeat_factor * region.sum() / cells
    total = 1 + w_rep + w_bg
    replay = torch.stack([bce(zeros[:, k], torch.zeros_like(zeros[:, k])) for k in range(len(star.new))])
    background = torch.stack([bce(ground[:, k], torch.zeros_like(ground[:, k])) for k in range(len(star.new))])
    unit = features / features.norm(dim=1, keepdim=True)
    push = []
    for c in star.new:
        if (labels == c).any():
            mask = F.interpolate((labels == c)[:, None].float(), features.shape[2:], mode="bilinear")
            centre = F.normalize((mask * unit).sum((0, 2, 3)), dim=0)
            push.append(1 / torch.stack([(centre - p).norm() for p in star.prototypes]).min())
    mask = F.interpolate(((labels == 0) & (pseudo_labels > 0))[:, None].float(), features.shape[2:], mode="bilinear")
    change = (mask * (features - old_features).square()).sum() / (WIDTH * mask.sum().clamp_min(1e-6))
    return {
        "current": current.sum() / total,
        "replay": w_rep * replay.sum() / total,
        "background": w_bg * background.sum() / total,
        "ocfm": 5 * change,
        "sad": 0.05 * torch.stack(push).mean(),
    }


def seconds(works: Sequence[Callable[[], dict[str, Tensor]]], device: torch.device, repeats: int) -> list[float]:
    """Shortest time of one forward and backward pass of each; they take turns, so that both meet the same load."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            torch.stack(list(work().values())).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [min(taken[1:]) for taken in times]


def agree(star: Star, batch: Batch, ours: Callable[[Batch], dict[str, Tensor]]) -> float:
    """Largest relative difference of a loss term when nothing is random."""
    kept = star.spreads, star.norms, star.replay_amounts
    star.spreads, star.norms = torch.zeros_like(star.spreads), star.norms * star.norms.new_tensor([1.0, 0.0])
    star.replay_amounts = None if star.replay_amounts is None else star.replay_amounts.round()
    a, b = ours(batch), straightforward(star, batch)
    star.spreads, star.norms, star.replay_amounts = kept
    return max(float((a[name] - b[name]).detach().abs() / b[name].detach().abs().clamp_min(1e-6)) for name in b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    print(f"{'case':<26}{'by class [ms]':>15}{'perdure [ms]':>15}{'faster':>9}{'difference':>13}")
    for case in CASES:
        star, batch = build(case, device)
        ours = star.later_loss if star.old else star.base_loss
        difference = agree(star, batch, ours)
        works = [partial(straightforward, star, batch), partial(ours, batch)]
        slow, fast = seconds(works, device, arguments.repeats)
        rows.append(case._asdict() | {"by_class_s": slow, "perdure_s": fast, "factor": slow / fast})
        print(f"{case.name:<26}{1e3 * slow:>15.1f}{1e3 * fast:>15.1f}{slow / fast:>8.1f}x{difference:>13.1e}")
    if arguments.json:
        about = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(about | {"cases": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
