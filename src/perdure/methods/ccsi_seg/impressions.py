"""Impressions for segmentation: images in which the old network predicts a drawn layout (spec CCSI, 8.2 to 8.4)."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from perdure.engine.phases import Progress
from perdure.errors import PerdureError
from perdure.methods.ccsi_seg import layouts
from perdure.methods.ccsi_seg.measurements import layer_of, moment_sums, recorded_maps
from perdure.methods.ccsi_seg.statistics import Statistics, decode, draw_background
from perdure.methods.ccsi_seg.terms import balanced_bce, dice_loss, edge_band, moment_loss, one_hot
from perdure.methods.inversion.engine import InversionBatch, InversionSettings, invert, l2, shift, tv1, warmup_cosine
from perdure.methods.options import Options
from perdure.networks.segmenter import Segmenter, upsample

BETAS: Final = (0.5, 0.9)
"""Decay rates of Adam on pixels, as in CCSI."""


class SynthesisOptions(Options):
    """How impressions are made."""

    per_class: int = Field(40, ge=1, description="impressions per class that are made before every later task")
    batch: int = Field(32, ge=1, description="impressions optimised together; their moments are matched together")
    steps: int = Field(60, ge=1, description="optimiser steps of a batch")
    lr: float = Field(0.05, gt=0, description="learning rate of Adam on the pixels, in units of the intensity window")
    start: Literal["mean", "colors"] = Field(
        "colors", description="start image: mean patches on the mean ground, or these recoloured from colour statistics"
    )
    noise: float = Field(0.1, ge=0, description="deviation of the noise on the start image, in normalised intensity")
    most_classes: int = Field(4, ge=1, description="most classes in one layout")
    warp: float = Field(0.12, ge=0, description="size of the elastic warp of a mean mask, as a share of its radius")
    band: int = Field(2, ge=0, description="pixels on either side of an edge of the layout that the teacher decides")
    lambda_layout: float = Field(1.0, ge=0, description="weight of balanced cross-entropy and Dice against the layout")
    lambda_global: float = Field(0.3, ge=0, description="weight of the moments of whole feature maps")
    lambda_masked: float = Field(0.3, ge=0, description="weight of the moments under each class's mask")
    lambda_tv: float = Field(0.05, ge=0, description="weight of total variation, per image")
    lambda_l2: float = Field(0.1, ge=0, description="weight of the distance to the start image, per image")
    first_layer: float = Field(10.0, gt=0, description="weight of the first convolution's moments, others weigh 1")
    jitter: float = Field(0.0625, ge=0, lt=0.5, description="largest shift while optimising, as a share of the side")
    confidence: float = Field(0.8, ge=0.5, lt=1, description="least certainty of the teacher to label a pixel")
    least_dice: float = Field(
        0.5, ge=0, le=1, description="impressions with a lower overlap of labels and layout are dropped"
    )


class Request(NamedTuple):
    """A batch to make: start images ``(N, C, H, W)``, layouts ``(N, H, W)``, shifts ``(steps, 2)`` int64."""

    start: Tensor
    layouts: Tensor
    shifts: Tensor


def plan_impressions(statistics: Statistics, options: SynthesisOptions, old: int, index: int) -> Request:
    """Draw layouts and paint the start images of item ``index``; wanted classes take turns over all items.

    Uses torch's generator.

    Args:
        statistics: Of all classes so far.
        options: Of the synthesis.
        old: Number of old classes; they come first.
        index: Number of the item.

    Raises:
        PerdureError: None of the old classes was ever seen.
    """
    known = (statistics.regions[:old] > 0).nonzero()[:, 0]
    if not len(known):
        raise PerdureError(
            "no old class was ever seen, so there is nothing to make impressions of",
            "check the training masks, or set method.replay=none",
        )
    first = index * options.batch
    last = min(first + options.batch, options.per_class * old)
    wanted = known[torch.arange(first, last, device=known.device) % len(known)]
    height, width = statistics.size.tolist()
    appearance, recolor = statistics.appearance(), options.start == "colors"
    mean, spread = decode(statistics.background, statistics.ends), float(recolor)  # without colours, no texture either
    tones, texture = statistics.tones * spread, statistics.texture * spread
    background = draw_background(len(wanted), (height, width), mean, tones, texture, statistics.power)
    plan = layouts.plan(appearance, wanted, options.most_classes, (height, width))
    start, rows = layouts.paint(appearance, plan, background, options.warp, recolor)
    start = start + options.noise * torch.randn_like(start)
    most = torch.tensor([int(options.jitter * side) for side in (height, width)])
    shifts = (torch.rand(options.steps, 2) * (2 * most + 1)).long() - most
    return Request(start, rows, shifts)


def synthesise(
    teacher: Segmenter,
    request: Request,
    statistics: Statistics,
    options: SynthesisOptions,
    progress: Progress | None = None,
) -> Tensor:
    """Images ``(N, C, H, W)`` in which the teacher predicts the layouts, near the start images and the moment bank.

    Args:
        teacher: Frozen network in evaluation mode.
        request: What to make; one that was begun comes from ``progress.saved["request"]``.
        statistics: Intensity window, and moments of the teacher on real images.
        options: Weights and steps.
        progress: Shows progress, saves, and holds what was saved.
    """
    low, high = statistics.ends[:, :, None, None]
    lr = options.lr * float((statistics.ends[1] - statistics.ends[0]).mean()) / 2

    def loss(images: Tensor, step: int) -> Tensor:
        terms = synthesis_terms(teacher, images[0], request, statistics, options, step)
        return torch.stack(list(terms.values())).sum()[None]

    def clamp(images: Tensor) -> None:
        images.copy_(images.clamp(low, high))

    def rate(step: int) -> float:
        return warmup_cosine(step, options.steps, lr)

    settings = InversionSettings(options.steps, rate, BETAS, clamp)
    batch = InversionBatch(request.start.clamp(low, high)[None], loss, settings)
    images, _ = invert([batch], options.steps, progress, request._asdict())
    return images[0]


def synthesis_terms(
    teacher: Segmenter, images: Tensor, request: Request, statistics: Statistics, options: SynthesisOptions, step: int
) -> dict[str, Tensor]:
    """Weighted terms of one step, on images and layouts shifted alike with zeros coming in."""
    down, right = request.shifts[step].tolist()
    layout, start = shift(request.layouts, down, right, -1), shift(request.start, down, right, 0)
    shown = shift(images, down, right, 0)
    counts = ~edge_band(layout, options.band)
    counts &= shift(torch.ones_like(layout), down, right, 0) > 0
    with recorded_maps(teacher.body) as maps:
        features = teacher.features(shown)
    logits = upsample(teacher.classify(features).float(), shown.shape[2:])
    targets = one_hot(layout, logits.shape[1])
    fit = balanced_bce(logits, targets, counts) + dice_loss(logits, targets, counts)
    terms = {
        "layout": options.lambda_layout * fit,
        "tv": options.lambda_tv * tv1(shown).sum(),
        # a root mean square over pixels, so that the weight does not depend on the size
        "l2": options.lambda_l2 * l2(shown - start).sum() / shown[0].numel() ** 0.5,
    }
    if options.lambda_global or options.lambda_masked:
        bank = statistics.class_moments
        shows = (targets.flatten(2).any(2).any(0) & bank.flatten(1).any(1)).nonzero()[:, 0]
        masks = torch.cat([torch.ones_like(targets[:, :1]), targets[:, shows]], 1)
        wanted = torch.cat([statistics.moments[:, None], bank[shows].transpose(0, 1)], 1)
        layers = layer_of(maps)
        losses = moment_loss(moment_sums(maps, masks).moments(layers), wanted, layers, options.first_layer)
        terms["moments"] = options.lambda_global * losses[0]
        terms["class_moments"] = options.lambda_masked * losses[1:].sum() / max(1, len(shows))
    return terms
