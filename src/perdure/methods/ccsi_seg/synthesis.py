"""Makes images in which the old network sees a given layout (spec CCSI, sections 8.2 to 8.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.engine.phases import Progress
from perdure.methods.inversion.engine import l2, tv1
from perdure.methods.ccsi_seg import moments
from perdure.methods.ccsi_seg.options import SynthesisOptions
from perdure.methods.ccsi_seg.terms import balanced_bce, dice_loss, edge_band, hot
from perdure.networks.segmenter import Segmenter, upsample

BETAS: Final = (0.5, 0.9)
EVERY: Final = 10
"""Steps between two looks at whether to save or to stop."""


class Bank(NamedTuple):
    """Moments to match: of all cells ``(2, T)``, and under each class ``(2, K, T)`` (zeros: nothing is known)."""

    overall: Tensor
    by_class: Tensor


class Request(NamedTuple):
    """A batch to make: start images ``(N, C, H, W)``, layouts ``(N, H, W)``, shifts ``(steps, 2)`` int64."""

    start: Tensor
    layouts: Tensor
    shifts: Tensor


def draw_shifts(options: SynthesisOptions, size: tuple[int, int]) -> Tensor:
    """Shift down and to the right for each step ``(steps, 2)``, drawn at once so that a resumed item repeats them."""
    most = torch.tensor([int(options.jitter * side) for side in size])
    return (torch.rand(options.steps, 2) * (2 * most + 1)).long() - most


def optimise(
    teacher: Segmenter,
    job: Request,
    bank: Bank,
    ends: Tensor,
    options: SynthesisOptions,
    progress: Progress | None = None,
) -> Tensor:
    """Images ``(N, C, H, W)`` that the teacher sees as the layouts, near the start images and the moment bank.

    Args:
        teacher: Frozen network in evaluation mode.
        job: What to make.
        bank: Moments of the teacher on real images.
        ends: Intensity window ``(2, C)``.
        options: Weights and steps.
        progress: Shows progress, saves, and holds what was saved.
    """
    low, high = ends[:, :, None, None]
    images = job.start.clamp(low, high).requires_grad_()
    lr = options.lr * float((ends[1] - ends[0]).mean()) / 2
    optimizer = torch.optim.Adam([images], lr=lr, betas=BETAS)
    saved = progress.saved if progress is not None else None
    done = 0
    if saved is not None:
        done = int(saved["step"])
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            images.copy_(saved["images"])
    for step in range(done, options.steps):
        optimizer.param_groups[0]["lr"] = lr * _decay(step, options.steps)
        terms = synthesis_terms(teacher, images, job, bank, options, step)
        with torch.enable_grad():
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            images.copy_(images.clamp(low, high))
        if progress is not None and (step + 1) % EVERY == 0 and step + 1 < options.steps:
            state = {"step": step + 1, "images": images.detach(), "optimizer": optimizer.state_dict(), **job._asdict()}
            progress.checkpoint(
                step + 1, options.steps, f"layout {float(terms['layout'].detach()):.2f}", lambda s=state: s
            )  # type: ignore[misc]
    return images.detach()


def resumed(saved: Mapping[str, Any], device: torch.device) -> Request:
    """The job of an item that was stopped half-way."""
    return Request(*(saved[name].to(device) for name in Request._fields))


def synthesis_terms(
    teacher: Segmenter, images: Tensor, job: Request, bank: Bank, options: SynthesisOptions, step: int
) -> dict[str, Tensor]:
    """Weighted terms of one step, on images and layouts shifted alike with zeros coming in."""
    down, right = job.shifts[step].tolist()
    layouts, start = (_shift(maps, down, right, fill) for maps, fill in ((job.layouts, -1), (job.start, 0)))
    shown = _shift(images, down, right, 0)
    counts = ~edge_band(layouts, options.band)
    counts &= _shift(torch.ones_like(layouts), down, right, 0) > 0
    with moments.tapped(teacher.body) as maps:
        features = teacher.features(shown)
    logits = upsample(teacher.classify(features).float(), shown.shape[2:])
    targets = hot(layouts, logits.shape[1])
    layout = balanced_bce(logits, targets, counts) + dice_loss(logits, targets, counts)
    pixels = shown[0].numel() ** 0.5
    terms = {
        "layout": options.lambda_layout * layout,
        "tv": options.lambda_tv * tv1(shown).sum(),
        # a root mean square a pixel, so that the weight does not depend on the size
        "l2": options.lambda_l2 * l2(shown - start).sum() / pixels,
    }
    if options.lambda_global or options.lambda_masked:
        terms |= _moment_terms(maps, targets, bank, options)
    return terms


def _moment_terms(maps: list[Tensor], targets: Tensor, bank: Bank, options: SynthesisOptions) -> dict[str, Tensor]:
    known = bank.by_class.flatten(2).any(2).any(0)
    there = (targets.flatten(2).any(2).any(0) & known).nonzero()[:, 0]
    masks = torch.cat([torch.ones_like(targets[:, :1]), targets[:, there]], 1)
    layers = moments.layer_of(maps)
    now = moments.moments(moments.moment_sums(maps, masks), layers)
    wanted = torch.cat([bank.overall[:, None], bank.by_class[:, there]], 1)
    losses = moments.moment_loss(now, wanted, layers, options.first_layer)
    by_class = losses[1:].sum() / max(1, len(there))
    return {"moments": options.lambda_global * losses[0], "class_moments": options.lambda_masked * by_class}


def _decay(step: int, steps: int) -> float:
    """Half a cosine from 1 to 0."""
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps))))


def _shift(maps: Tensor, down: int, right: int, fill: float) -> Tensor:
    """Move ``(..., H, W)`` by whole pixels; ``fill`` comes in."""
    return F.pad(maps, (right, -right, down, -down), value=fill)
