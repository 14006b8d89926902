"""Class impressions: images optimised until the frozen network takes them for their class (spec CCSI, section 3).

Groups of images are optimised side by side. The result of a group depends on the seed, the group's number and the
step alone, not on how many groups run together, in what order, or in how many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.engine.phases import Progress
from perdure.errors import PerdureError, UsageError
from perdure.methods.ccsi.options import SynthesisOptions
from perdure.methods.inversion.engine import (
    InversionBatch,
    InversionSettings,
    JitterFlip,
    check_loss,
    invert,
    l2,
    tv1,
    tv2,
)
from perdure.methods.inversion.norm_statistics import InputMoments, Probe, segment_norms
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import continual_norms
from perdure.seeds import derive_seed

CPU_PIXELS: Final = 2 * 40 * 32 * 32
"""Pixels of the images that a CPU takes in one tensor: few enough for its cache, enough for several threads."""
IMAGENET_RANGE: Final = ((0 - 0.485) / 0.229, (1 - 0.485) / 0.229)
"""Bounds of the published clip: ImageNet's first channel, standardised (Q4)."""


@dataclass(frozen=True)
class Request:
    """Which impressions to make.

    Args:
        targets: Channel of each image ``(G, B)`` int64, one row per group; see :func:`plan_groups`.
        numbers: Number of each group among all that belong to the seed: what its random draws depend on.
        seed: Of all random draws.
        means: Mean image of every old class ``(K, C, H, W)`` in [0, 1]; with ``start: noise`` only its shape counts.
        moments: Kept moments of every old class ``(K, groups, 2 or more)``, for ``statistics: class``.
    """

    targets: Tensor
    numbers: Sequence[int]
    seed: int
    means: Tensor
    moments: Tensor | None = None


class Impressions(NamedTuple):
    """Images ``(n, C, H, W)`` float32, the channel each was made for ``(n,)``, and the final terms by group.

    ``losses`` holds the weighted terms ``(G,)`` of the finished images, not moved and in float32.
    ``steps (G,)`` counts the steps each group took.
    """

    images: Tensor
    labels: Tensor
    losses: dict[str, Tensor]
    steps: Tensor


def plan_groups(groups: int, classes: int, options: SynthesisOptions, seed: int) -> Tensor:
    """Channel of every image to make: ``(groups, group_size)`` int64.

    Balanced: 0, 1, … in turn through all groups, so counts of classes differ by at most one. Random: uniform, a
    function of the seed and the group's number.
    """
    if options.targets == "balanced":
        return (torch.arange(groups * options.group_size) % classes).view(groups, -1)
    generators = [_generator(seed, "targets", number) for number in range(groups)]
    return torch.stack([torch.randint(classes, (options.group_size,), generator=g) for g in generators])


def start_images(request: Request, options: SynthesisOptions) -> Tensor:
    """Images to start from ``(G * B, C, H, W)`` on the device of the means (spec 3.2).

    The class mean plus noise of standard deviation ``noise``; or standard normal noise alone.

    Raises:
        PerdureError: A mean has numbers that are not finite.
    """
    means = request.means.float()
    if options.start == "mean" and not torch.isfinite(means).all():
        raise PerdureError(
            "a class mean image has numbers that are not finite", "look at the images of that class for broken files"
        )
    size = (request.targets.shape[1], *means.shape[1:])
    noise = [torch.randn(size, generator=_generator(request.seed, "noise", number)) for number in request.numbers]
    drawn = torch.cat(noise).to(means.device)
    if options.start == "noise":
        return drawn
    return means[request.targets.flatten().to(means.device)] + options.noise * drawn


def _generator(seed: int, what: str, number: int) -> torch.Generator:
    """Random numbers of one group; on the CPU, so that every device gets the same."""
    return torch.Generator().manual_seed(derive_seed(seed, what, number))


class Objective:
    """The synthesis loss of groups of images against one frozen network (spec 3.3).

    Args:
        teacher: The network that impressions are made from; copied, the original is left as it is.
        options: Weights of the terms.
        moments: Kept moments of every class ``(K, groups, 2 or more)``, see `class_moments`; for
            ``statistics: class``.
        bf16: Take the products of convolutions in bfloat16.

    Raises:
        PerdureError: The network or the moments hold numbers that are not finite, or there is nothing to match.
        UsageError: The statistics asked for do not exist.
    """

    def __init__(
        self, teacher: Classifier, options: SynthesisOptions, moments: Tensor | None = None, bf16: bool = False
    ) -> None:
        self.options, self.probe = options, Probe(teacher, bf16)
        self._layer_weights = torch.ones_like(self.probe.running_mean[: self.probe.layers])
        self._layer_weights[0] = options.first_layer
        wanted = options.statistics if options.statistics_weight else "none"
        self._statistics: Callable[[InputMoments, Tensor], Tensor] | None = None
        if wanted != "none" and not self.probe.groups:
            raise UsageError(
                f"synthesis.statistics is '{wanted}', but the network has no Continual Normalization",
                "set network.norm=continual or synthesis.statistics=none",
            )
        if wanted == "class":
            self._kept = self._check_moments(moments)
            self._statistics = self._class_distance
        if wanted == "position":
            self._kept = self._position_moments(teacher)
            self._statistics = self._position_distance

    def terms(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Weighted terms of every group; those of weight 0 are left out.

        Args:
            images: ``(groups * B, C, H, W)``.
            targets: Channel that each image should win ``(groups, B)``.

        Returns:
            ``(groups,)`` each: ``ce``, ``tv2``, ``tv1``, ``l2``, ``moments``, ``statistics``.
        """
        options, groups = self.options, len(targets)
        logits, _, found = self.probe(images)
        ce = F.cross_entropy(logits, targets.flatten(), reduction="none").view(groups, -1).mean(1)
        terms = {"ce": options.kappa * ce}
        if options.tv2:
            terms["tv2"] = options.tv2 * tv2(images, groups)
        if options.tv1:
            terms["tv1"] = options.tv1 * tv1(images, groups)
        if options.l2:
            terms["l2"] = options.l2 * l2(images, groups)
        if options.moments:
            # R_feat: Σ r_ℓ (‖v_ℓ - V_ℓ‖ + ‖m_ℓ - M_ℓ‖) over layers, r = first_layer for the first and 1 for others
            mean, var = self.probe.batch_moments(found, groups)
            apart = torch.stack([mean - self.probe.running_mean, var - self.probe.running_var])
            norms = segment_norms(apart, self.probe.channel_layers, self.probe.layers)
            terms["moments"] = options.moments * (norms.sum(0) * self._layer_weights).sum(1)
        if self._statistics is not None:
            terms["statistics"] = options.statistics_weight * self._statistics(found, targets)
        return terms

    def _check_moments(self, moments: Tensor | None) -> Tensor:
        """Means and variances ``(2, K, groups)`` of the kept moments, once they fit the network."""
        if moments is None or moments.shape[1] != self.probe.groups:
            raise UsageError(
                "there are no moments of the old classes for this network", "set synthesis.statistics=none"
            )
        if not torch.isfinite(moments).all():
            raise PerdureError(
                "the kept moments of old classes have numbers that are not finite",
                "train the earlier task again with a smaller learning rate (training.lr)",
            )
        return moments[..., :2].to(self.probe.running_mean).movedim(2, 0)

    def _class_distance(self, found: InputMoments, targets: Tensor) -> Tensor:
        """Spec 3.5: Σ_ℓ ‖ḡ_ℓc(x̃) - ḡ_ℓc‖ of means and of variances, averaged over the classes c that a group shows.

        ḡ is the mean over the group's images of class c of the moments of the groups of channels.
        """
        probe = self.probe
        shown = F.one_hot(targets, self._kept.shape[1]).to(found.mean.dtype).transpose(1, 2)
        counts = shown.sum(2, keepdim=True)
        moments = torch.stack(probe.channel_groups(found)).view(2, *targets.shape, -1)
        apart = (shown / counts.clamp_min(1)) @ moments - self._kept[:, None]
        by_class = segment_norms(apart, probe.group_layers, probe.layers).sum((0, 3))
        present = (counts[..., 0] > 0).to(by_class.dtype)
        return (by_class * present).sum(1) / present.sum(1)

    def _position_moments(self, teacher: Classifier) -> Tensor:
        """Moments of the last full training batch ``(2, B, groups)``, as ContinualNorm layers have stored them."""
        stored = [(norm.group_mean, norm.group_var) for norm in continual_norms(teacher)]
        full = [(m, v) for m, v in stored if m is not None and v is not None and len(m) == self.options.group_size]
        if len(full) < len(stored):
            raise UsageError(
                f"the network keeps no statistics of training batches of {self.options.group_size} images",
                "set network.group_statistics=true and training.batch_size to synthesis.group_size, or "
                "synthesis.statistics=class",
            )
        return torch.stack([torch.cat(part, 1) for part in zip(*full, strict=True)])

    @torch.no_grad()
    def _position_distance(self, found: InputMoments, targets: Tensor) -> Tensor:
        """The published form: distance to the moments of the last full training batch, image i against image i.

        It is computed from detached values, so it has no gradient and only sways which iterate is the best (J3). The
        distance of a layer has the weight r of its moment term.
        """
        probe = self.probe
        moments = torch.stack(probe.channel_groups(found)).view(2, *targets.shape, -1)
        columns = torch.linalg.vector_norm(moments - self._kept[:, None], dim=2)
        return (segment_norms(columns, probe.group_layers, probe.layers).sum(0) * self._layer_weights).sum(1)


def synthesise(
    teacher: Classifier, request: Request, options: SynthesisOptions, progress: Progress | None = None
) -> Impressions:
    """Make impressions on the teacher's device.

    Args:
        teacher: Is not changed and gets no gradients; it is used as in evaluation mode.
        request: What to make.
        options: How.
        progress: Shows progress and saves the work; a saved one continues where it was, to the same result.

    Raises:
        PerdureError: The teacher or the means hold numbers that are not finite, or the loss stops being finite.
        UsageError: The statistics asked for do not exist.
        Interrupted: The progress was asked to stop; the work is saved.
    """
    device = teacher.head.scale.device
    bf16 = options.precision == "bf16"
    if options.precision == "auto" and device.type == "cpu":  # on a GPU the casts cost more than the products save
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # newer than the oldest torch that will do
        bf16 = native is not None and bool(native())
    objective = Objective(teacher, options, request.moments, bf16)
    batches = inversion_batches(objective, request, options, device)
    images, steps = invert(batches, options.steps, progress)
    exact, targets = Objective(teacher, options, request.moments), request.targets.to(device)
    # one group at a time: the memory of all at once is not needed for a single pass
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        parts = [exact.terms(group, targets[row : row + 1]) for row, group in enumerate(images)]
    losses = {name: check_loss(torch.cat([part[name] for part in parts])) for name in parts[0]}
    return Impressions(images.flatten(0, 1), targets.flatten(), losses, steps)


def inversion_batches(
    objective: Objective, request: Request, options: SynthesisOptions, device: torch.device
) -> list[InversionBatch]:
    """The groups of a request at their first step.

    On a GPU all groups in one tensor; on a CPU as many as its cache likes, and at least one.
    """

    def clamp(images: Tensor) -> None:
        if options.clamp == "range":
            images.clamp_(0, 1)
        else:
            images[:, :, 0].clamp_(*IMAGENET_RANGE)

    def batch(part: slice) -> InversionBatch:
        moves = JitterFlip(request.numbers[part], options.steps, options.jitter, options.flip, request.seed)

        def loss(images: Tensor, step: int) -> Tensor:
            terms = objective.terms(moves(images, step).flatten(0, 1), targets[part])
            return torch.stack(list(terms.values())).sum(0)

        return InversionBatch(start[part], loss, settings)

    settings = InversionSettings(
        options.steps,
        options.rate,
        options.betas,
        clamp,
        options.keep,
        options.warmup,
        options.settle_window,
        options.settle_tolerance,
    )
    targets = request.targets.to(device)
    start = start_images(request, options).to(device)
    start = start.view(*targets.shape, *start.shape[1:])
    each = max(1, CPU_PIXELS // start[0, :, 0].numel()) if device.type == "cpu" else len(targets)
    return [batch(slice(first, first + each)) for first in range(0, len(targets), each)]
