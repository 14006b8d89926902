"""From noise to pairs, and what a pair is checked for (spec CGR 2.5, 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perdure.engine.options import Precision
from perdure.engine.phases import Progress
from perdure.engine.state import State
from perdure.networks.joint_diffusion.network import JointDiffusion
from perdure.networks.joint_diffusion.noise import Sampler, scheduler

BINS = 64
"""Of the areas of a structure, four per doubling: the smallest is 1 / 65,536 of the image."""
LARGEST_PIECE = 0.95
"""Least share of a structure's pixels that its largest connected piece has to hold."""


@torch.no_grad()
def denoise(
    network: JointDiffusion,
    start: Tensor,
    text: Tensor,
    tasks: Tensor | None,
    sampler: Sampler = "ddim",
    steps: int = 100,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Pairs ``(N, C + 1, H, W)`` float32 from noise of that shape, both parts at once.

    Args:
        network: The generator.
        start: Gaussian noise.
        text: ``(N, T, width)`` embedded prompts, before the adapters.
        tasks: ``(N,)`` int64, see :class:`~perdure.networks.joint_diffusion.network.JointDiffusion`.
        sampler: See :func:`~perdure.networks.joint_diffusion.noise.scheduler`.
        steps: Evaluations of the network.
        precision: Of the network.
        progress: Where to go on after a stop: what was saved holds the noise as it is by then.
    """
    if tasks is not None:
        text = network.adapted(text, tasks)  # once: they are the same at every step
    plan, pairs, first = scheduler(sampler, steps), start, 0
    if progress is not None and progress.saved is not None:
        pairs, first = _resumed(plan, progress.saved, start)
    for done, time in enumerate(plan.timesteps[first:], first + 1):
        half = precision in ("bf16", "fp16")
        kind = torch.bfloat16 if precision == "bf16" else torch.float16
        with torch.autocast(start.device.type, kind) if half else nullcontext():
            noise = network(pairs, time.to(start.device).expand(len(pairs)), text)
        pairs = plan.step(noise.float(), time, pairs, return_dict=False)[0]
        if progress is not None and done < len(plan.timesteps):
            progress.checkpoint(done, len(plan.timesteps), "steps", partial(_state, plan, pairs, done))
    return pairs.float().clamp(-1.0, 1.0)


def _state(plan: Any, pairs: Tensor, done: int) -> dict[str, object]:
    """What :func:`_resumed` needs; of DPM-Solver++ also the predictions of earlier steps."""
    earlier = [t for t in getattr(plan, "model_outputs", ()) if t is not None]
    return {"pairs": pairs, "done": done, "earlier": earlier, "order": getattr(plan, "lower_order_nums", 0)}


def _resumed(plan: Any, saved: State, like: Tensor) -> tuple[Tensor, int]:
    if hasattr(plan, "model_outputs"):
        earlier = [t.to(like.device) for t in saved["earlier"]]
        plan.model_outputs = [None] * (len(plan.model_outputs) - len(earlier)) + earlier
        plan.lower_order_nums = saved["order"]
        plan.set_begin_index(saved["done"])
    return saved["pairs"].to(like.device), int(saved["done"])


def area_bins(codes: Tensor, classes: int) -> Tensor:
    """Count the areas of each class in masks ``(N, H, W)`` by size, ``(classes, BINS)`` int64; without absent ones."""
    found = torch.zeros(classes, BINS, dtype=torch.int64, device=codes.device)
    for code in range(1, classes + 1):
        share = (codes == code).flatten(1).float().mean(1)
        share = share[share > 0]
        found[code - 1] = torch.bincount(_bin(share), minlength=BINS)
    return found


def _bin(share: Tensor) -> Tensor:
    return (BINS + 4.0 * share.log2()).floor().long().clamp(0, BINS - 1)


def usual(areas: Tensor, part: float = 0.001) -> tuple[Tensor, Tensor]:
    """First and last bin of each class ``(classes,)`` between which all but the share ``part`` at either end lie."""
    total = areas.sum(1, keepdim=True).clamp_min(1)
    below = areas.cumsum(1) / total
    return (below <= part).sum(1), (below < 1.0 - part).sum(1)


def sound(codes: Tensor, areas: Tensor) -> Tensor:
    """Which masks ``(N, H, W)`` look like those of the task, ``(N,)`` bool.

    Some class is shown, each has an area that occurred in training, and each is nearly in one piece.

    Args:
        codes: Local codes.
        areas: ``(classes, BINS)`` of the task's own masks, from :func:`area_bins`.
    """
    low, high = usual(areas.cpu())
    found = [_sound(mask, low.tolist(), high.tolist()) for mask in codes.cpu()]
    return torch.tensor(found, dtype=torch.bool)


def agreement(codes: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Dice of two masks ``(N, H, W)`` with local codes, mean over the classes that either shows, ``(N,)`` float32.

    1 where both are empty.
    """
    one, two = (
        (torch.arange(1, classes + 1).view(1, -1, 1, 1) == mask[:, None]).flatten(2) for mask in (codes, predicted)
    )
    sizes = one.sum(2) + two.sum(2)
    dice = 2.0 * (one & two).sum(2) / sizes.clamp_min(1)
    shown = (sizes > 0).sum(1)
    return torch.where(shown > 0, dice.sum(1) / shown.clamp_min(1), 1.0)


def _sound(mask: Tensor, low: Sequence[int], high: Sequence[int]) -> bool:
    from scipy import ndimage  # comes with scikit-learn; slow to load

    if not bool((mask > 0).any()):
        return False
    for code, (least, most) in enumerate(zip(low, high, strict=True), 1):
        here = mask == code
        pixels = int(here.sum())
        if not pixels:
            continue
        if not least <= int(_bin(here.float().mean()[None])) <= most:
            return False
        pieces = ndimage.label(here.numpy())[0]
        if torch.from_numpy(pieces).flatten().bincount()[1:].max() < LARGEST_PIECE * pixels:
            return False
    return True
