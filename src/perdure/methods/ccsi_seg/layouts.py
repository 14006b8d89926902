"""New layouts of old classes: mean masks, placed, bent and cut out so that sizes are as they were (spec 8.2 a)."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.methods.ccsi_seg.measurements import REACH
from perdure.methods.ccsi_seg.terms import NOTHING

TRIES: Final = 16
"""Places drawn for each class of a layout; the freest is taken."""
KNOTS: Final = 5
"""Knots a side of the elastic warp, over a patch."""
TURN: Final = 0.14
"""Deviation of a random turn in radians."""
STRETCH: Final = 0.1
"""Deviation of the log of a random stretch along either axis."""
FAR: Final = 2.0
"""Drawn facts lie at most so many deviations from their mean."""
EDGE: Final = 0.2
"""Width of a painted edge in units of the mean mask."""


class ClassAppearance(NamedTuple):
    """What K classes look like, from the stored statistics.

    Args:
        masks: Mean masks ``(K, 1, P, P)``, 0..1.
        patches: Mean patches ``(K, C, P, P)``.
        facts: Mean and deviation of the numbers about a region ``(K, FACTS, 2)``.
        chance: Chance that an image with class i also shows class j ``(K, K)``; 0 on the diagonal.
        colors: Mean colour of region and ring ``(K, 2C)``.
        color_spread: Their covariance ``(K, 2C, 2C)``.
    """

    masks: Tensor
    patches: Tensor
    facts: Tensor
    chance: Tensor
    colors: Tensor
    color_spread: Tensor


class Plan(NamedTuple):
    """Which classes go where in N images of up to S classes, largest first.

    Rows ``(N, S)`` (−1: none), centre y, x ``(N, S, 2)`` and radius ``(N, S)`` in pixels, area / radius² ``(N, S)``.
    """

    rows: Tensor
    centre: Tensor
    radius: Tensor
    fill: Tensor


def plan(appearance: ClassAppearance, wanted: Tensor, most: int, size: tuple[int, int]) -> Plan:
    """Draw layouts that show the wanted classes, and others with them as often as they occurred together.

    Uses torch's generator.

    Args:
        appearance: Of the classes.
        wanted: Row of the class that each image is made for ``(N,)``.
        most: Most classes an image.
        size: H, W.
    """
    count, classes = len(wanted), len(appearance.masks)
    device = wanted.device
    others = torch.rand(count, classes, device=device) < appearance.chance[wanted]
    rank = torch.rand(count, classes, device=device) * others
    slots = min(most - 1, classes)
    value, drawn = rank.topk(slots, 1)
    rows = torch.cat([wanted[:, None], torch.where(value > 0, drawn, NOTHING)], 1)

    deviates = torch.randn(count, slots + 1, appearance.facts.shape[1], device=device).clamp(-FAR, FAR)
    mean, deviation = appearance.facts[rows.clamp_min(0)].unbind(-1)
    fill, scale, *_ = (mean + deviation * deviates).unbind(-1)
    radius = scale.exp() * (size[0] * size[1]) ** 0.5
    centre = _places(rows, mean[..., 2:], deviation[..., 2:], radius, size)
    order = torch.where(rows >= 0, radius, 0.0).argsort(1, descending=True)
    return Plan(
        rows.gather(1, order),
        centre.gather(1, order[..., None].expand(-1, -1, 2)),
        radius.gather(1, order),
        fill.exp().gather(1, order),
    )


def _places(rows: Tensor, mean: Tensor, deviation: Tensor, radius: Tensor, size: tuple[int, int]) -> Tensor:
    """Centres in pixels ``(N, S, 2)``: of TRIES draws from the class's own places the one farthest from the others."""
    count, slots = rows.shape
    draws = torch.randn(TRIES, count, slots, 2, device=rows.device).clamp(-FAR, FAR)
    tries = (mean + deviation * draws).clamp(0.02, 0.98) * mean.new_tensor(size)
    centre = tries[0].clone()
    for slot in range(1, slots):
        gaps = (tries[:, :, slot, None] - centre[None, :, :slot]).norm(dim=-1)
        gaps = gaps / (radius[:, slot, None] + radius[:, :slot])
        gaps = torch.where(rows[:, :slot] >= 0, gaps, torch.inf)
        # beyond twice the radii a place is as free as any other
        best = gaps.amin(-1).clamp_max(2.0).argmax(0)
        centre[:, slot] = tries[best, torch.arange(count, device=rows.device), slot]
    return centre


def paint(
    appearance: ClassAppearance, layout: Plan, background: Tensor, warp: float, recolor: bool
) -> tuple[Tensor, Tensor]:
    """Paint a plan on backgrounds: start images ``(N, C, H, W)`` and rows ``(N, H, W)``, −1 where there is no class.

    Larger classes first, so that smaller ones stay visible. Uses torch's generator.

    Args:
        appearance: Of the classes.
        layout: The plan.
        background: ``(N, C, H, W)``.
        warp: Size of the elastic warp in radii.
        recolor: Give each region a colour drawn for its surroundings instead of the mean patch's own.
    """
    images = background.clone()
    labels = torch.full_like(background[:, 0], NOTHING, dtype=torch.int64)
    levels = _levels(appearance.masks, layout)
    for slot in range(layout.rows.shape[1]):
        rows = layout.rows[:, slot].clamp_min(0)
        there = (layout.rows[:, slot] >= 0)[:, None, None]
        grid = _grid(layout.centre[:, slot], layout.radius[:, slot], background.shape[2:], warp)
        inside = grid.abs().amax(-1) <= 1
        both = F.grid_sample(
            torch.cat([appearance.patches[rows], appearance.masks[rows]], 1),
            grid,
            padding_mode="border",
            align_corners=False,
        )
        patch, lead = both[:, :-1], both[:, -1] - levels[:, slot, None, None]
        region = (lead >= 0) & inside & there
        if recolor:
            patch = patch + _recoloring(appearance, rows, images, region)[:, :, None, None]
        cover = (lead / EDGE + 0.5).clamp(0, 1) * (inside & there)
        images = torch.lerp(images, patch, cover[:, None])
        labels = torch.where(region, rows[:, None, None], labels)
    return images, labels


def _levels(masks: Tensor, layout: Plan) -> Tensor:
    """Level ``(N, S)`` at which a mean mask covers the area that a plan asks for; below its peak by half an edge."""
    side = masks.shape[-1]
    cells = layout.fill * (side / (2 * REACH)) ** 2
    ranked = masks.flatten(1).sort(1, descending=True).values
    last = (cells.round().long() - 1).clamp(0, side * side - 1)
    rows = layout.rows.clamp_min(0)
    return torch.minimum(ranked[rows, last], ranked[rows, 0] - EDGE / 2).clamp_min(0.05)


def _grid(centre: Tensor, radius: Tensor, size: torch.Size, warp: float) -> Tensor:
    """Where each pixel falls in its class's patch: ``(N, H, W, 2)``, x before y, −1..1 inside the patch."""
    count, device = len(centre), centre.device
    y = torch.arange(size[0], device=device) + 0.5 - centre[:, :1]
    x = torch.arange(size[1], device=device) + 0.5 - centre[:, 1:]
    turn = TURN * torch.randn(count, 1, 1, device=device)
    stretch = (STRETCH * torch.randn(count, 2, 1, 1, device=device)).exp() / (REACH * radius[:, None, None, None])
    y, x = y[:, :, None], x[:, None, :]
    v = (turn.cos() * y - turn.sin() * x) * stretch[:, 0]
    u = (turn.sin() * y + turn.cos() * x) * stretch[:, 1]
    grid = torch.stack([u, v], -1)
    field = torch.randn(count, 2, KNOTS, KNOTS, device=device) * (warp / REACH)
    bend = F.grid_sample(field, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return grid + bend.movedim(1, -1)


def _recoloring(appearance: ClassAppearance, rows: Tensor, images: Tensor, region: Tensor) -> Tensor:
    """What to add to mean patches ``(N, C)``: a colour drawn given the pixels beneath, minus the mean colour."""
    channels = images.shape[1]
    weight = region[:, None].to(images)
    beneath = (images * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1.0)
    spread = appearance.color_spread[rows]
    own, cross, ring = spread[:, :channels, :channels], spread[:, :channels, channels:], spread[:, channels:, channels:]
    # a ridge, for a class that was seen a few times has no full covariance
    ridge = 1e-3 * torch.eye(channels, device=images.device)
    slope = torch.linalg.solve(ring + ridge, cross.mT).mT
    shift = torch.einsum("ndc,nc->nd", slope, beneath - appearance.colors[rows, channels:])
    rest = root(own - slope @ cross.mT)
    return shift + torch.einsum("ndc,nc->nd", rest, torch.randn(len(rows), channels, device=images.device))


def root(covariance: Tensor) -> Tensor:
    """Symmetric root of a covariance ``(..., C, C)``; rounding errors below 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance.double())
    half: Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
    return half.to(covariance)
