"""What an impression should look like to the frozen network: the terms of the synthesis loss, a group each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import PerdureError, UsageError
from perdure.methods.ccsi import priors
from perdure.methods.ccsi.moments import Probe, Raw, segment_norms
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import continual_norms

if TYPE_CHECKING:
    from perdure.methods.ccsi.synthesis import SynthesisOptions

Statistics = Callable[[Raw, Tensor], Tensor]
"""Raw moments of ``groups * B`` images and targets ``(groups, B)`` -> a penalty for each group."""


class Objective:
    """The synthesis loss of groups of images against one frozen network (spec 3.3).

    The sum over groups is minimised: no term of a group depends on another group, so each is optimised as if alone.

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
        self.options = options
        self.probe = Probe(teacher, bf16)
        self._layer_weights = torch.ones_like(self.probe.running_mean[: self.probe.layers])
        self._layer_weights[0] = options.first_layer
        self._statistics = _statistics(self.probe, teacher, options, moments)

    def terms(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Weighted terms of every group; those of weight 0 are left out.

        Args:
            images: ``(groups * B, C, H, W)``.
            targets: Channel that each image should win ``(groups, B)``.

        Returns:
            ``(groups,)`` each: ``ce``, ``tv2``, ``tv1``, ``l2``, ``moments``, ``statistics``.
        """
        options, groups = self.options, len(targets)
        logits, _, raw = self.probe(images)
        ce = F.cross_entropy(logits, targets.flatten(), reduction="none").view(groups, -1).mean(1)
        found = {"ce": options.kappa * ce}
        if options.tv2:
            found["tv2"] = options.tv2 * priors.tv2(images, groups)
        if options.tv1:
            found["tv1"] = options.tv1 * priors.tv1(images, groups)
        if options.l2:
            found["l2"] = options.l2 * priors.l2(images, groups)
        if options.moments:
            found["moments"] = options.moments * self._moment_distance(raw, groups)
        if self._statistics is not None:
            found["statistics"] = options.statistics_weight * self._statistics(raw, targets)
        return found

    def gradient(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every group ``(groups,)`` and gradient of each image ``(groups * B, C, H, W)``."""
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            total = torch.stack(list(self.terms(images, targets).values())).sum(0)
            (gradient,) = torch.autograd.grad(total.sum(), images)
        return total.detach(), gradient

    def _moment_distance(self, raw: Raw, groups: int) -> Tensor:
        """R_feat: Σ r_ℓ (‖v_ℓ - V_ℓ‖ + ‖m_ℓ - M_ℓ‖) over layers, r = ``first_layer`` for the first and 1 for others."""
        probe = self.probe
        mean, var = probe.batch_moments(raw, groups)
        apart = torch.stack([mean - probe.running_mean, var - probe.running_var])
        return (probe.layer_norms(apart).sum(0) * self._layer_weights).sum(1)


def _statistics(
    probe: Probe, teacher: Classifier, options: SynthesisOptions, moments: Tensor | None
) -> Statistics | None:
    """The penalty on moments of single images that the options ask for, if any."""
    if options.statistics == "none" or not options.statistics_weight:
        return None
    if not probe.groups:
        raise UsageError(
            f"synthesis.statistics is '{options.statistics}', but the network has no Continual Normalization",
            "set network.norm=continual or synthesis.statistics=none",
        )
    if options.statistics == "position":
        return _by_position(probe, teacher, options)
    if moments is None or moments.shape[1] != probe.groups:
        raise UsageError("there are no moments of the old classes for this network", "set synthesis.statistics=none")
    return _by_class(probe, moments)


def _by_class(probe: Probe, kept: Tensor) -> Statistics:
    """Spec 3.5: Σ_ℓ ‖ḡ_ℓc(x̃) - ḡ_ℓc‖ of means and of variances, averaged over the classes c that a group shows.

    ḡ is the mean over the group's images of class c of the moments of the groups of channels.
    """
    if not torch.isfinite(kept).all():
        raise PerdureError(
            "the kept moments of old classes have numbers that are not finite",
            "train the earlier task again with a smaller learning rate (training.lr)",
        )
    stored = kept[..., :2].to(probe.running_mean).movedim(2, 0)

    def penalty(raw: Raw, targets: Tensor) -> Tensor:
        shown = F.one_hot(targets, len(kept)).to(raw.mean.dtype).transpose(1, 2)
        counts = shown.sum(2, keepdim=True)
        found = torch.stack(probe.channel_groups(raw)).view(2, *targets.shape, -1)
        apart = (shown / counts.clamp_min(1)) @ found - stored[:, None]
        by_class = segment_norms(apart, probe.group_layers, probe.layers).sum((0, 3))
        present = (counts[..., 0] > 0).to(by_class.dtype)
        return (by_class * present).sum(1) / present.sum(1)

    return penalty


def _by_position(probe: Probe, teacher: Classifier, options: SynthesisOptions) -> Statistics:
    """The published form: distance to the moments of the last full training batch, image i against image i.

    It is computed from detached values, so it has no gradient and only sways which iterate is the best (J3). The
    distance of a layer has the weight r of its moment term.
    """
    norms = continual_norms(teacher)
    stored = [(norm.group_mean, norm.group_var) for norm in norms]
    if any(mean is None or var is None or mean.shape[0] != options.group_size for mean, var in stored):
        raise UsageError(
            f"the network keeps no statistics of training batches of {options.group_size} images",
            "set network.group_statistics=true and training.batch_size to synthesis.group_size, or "
            "synthesis.statistics=class",
        )
    table = torch.stack([torch.cat([pair[i] for pair in stored], 1) for i in (0, 1)])  # type: ignore[misc]
    weights = torch.ones(probe.layers, device=table.device)
    weights[0] = options.first_layer

    def penalty(raw: Raw, targets: Tensor) -> Tensor:
        with torch.no_grad():
            found = torch.stack(probe.channel_groups(raw)).view(2, *targets.shape, -1)
            columns = torch.linalg.vector_norm(found - table[:, None], dim=2)
            return (segment_norms(columns, probe.group_layers, probe.layers).sum(0) * weights).sum(1)

    return penalty
