"""The loss of the update (spec CCSI 4.7), put together from its terms."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.engine.phases import Terms
from perdure.methods.ccsi import terms
from perdure.methods.ccsi.options import CcsiOptions
from perdure.networks.classifier import Classifier
from perdure.networks.layers import without_updates


@dataclass(frozen=True)
class Update:
    """What a task minimises.

    Args:
        options: Weights of the terms.
        network: The network that learns.
        before: The frozen network of the task before; ``None`` at the first task.
        old: Number of old classes O_t, the first channels.
        step: Regular number of new classes a task, c of 4.3.
    """

    options: CcsiOptions
    network: Classifier
    before: Classifier | None
    old: int
    step: int

    def __call__(
        self,
        images: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        unlabelled: Tensor | None,
        centroids: Tensor | None,
    ) -> tuple[Terms, Tensor | None]:
        """Weighted terms, and where the moving centroids are now.

        Args:
            images: ``(N, C, H, W)``, new ones and those that stand for old classes.
            targets: Their channels ``(N,)``.
            weights: Class weights ``(K,)``, or ``None``.
            unlabelled: Images for the contrastive loss, or ``None`` for none.
            centroids: Those of labelled and unlabelled images ``(2, K, K)``; ``None`` at the start of an epoch.
        """
        features = self.network.features(images)
        cosines = self.network.cosines(features).float()
        found = {"ce": terms.weighted_ce(cosines * self.network.head.scale, targets, weights)}
        if self.before is not None:
            found |= self._against_forgetting(images, features, cosines, targets, self.before)
        if unlabelled is not None:
            others = self._look_at(unlabelled)
            now = torch.stack([terms.centroids(cosines, targets), terms.centroids(others, others.argmax(1))])
            before = torch.zeros_like(now) if centroids is None else centroids
            source, target = moved = terms.moving(before, now, self.options.idc_momentum)
            found["idc"] = self.options.lambda_idc * terms.idc(source, target, self.options.idc_temperature)
            centroids = moved.detach()
        return found, centroids

    def _against_forgetting(
        self, images: Tensor, features: Tensor, cosines: Tensor, targets: Tensor, before: Classifier
    ) -> Terms:
        """4.3 and 4.4: features stay in direction, old samples keep their distance from new classes."""
        options, found = self.options, {}
        if options.lambda_lf > 0:
            with torch.no_grad():
                known = before.features(images)
            weight = terms.less_forget_weight(options.lambda_lf, self.old, self.step)
            found["lf"] = weight * terms.less_forget(features, known)
        if options.lambda_margin > 0 and options.replay != "none":
            ranked = terms.margin_ranking(cosines, targets, self.old, options.margin, options.margin_top)
            found["margin"] = options.lambda_margin * ranked
        return found

    def _look_at(self, unlabelled: Tensor) -> Tensor:
        """Cosines ``(N, K)`` of unlabelled images; they leave the running statistics alone unless asked to (J4)."""
        still = nullcontext() if self.options.idc_moves_statistics else without_updates(self.network)
        with still:
            return self.network.cosines(self.network.features(unlabelled)).float()
