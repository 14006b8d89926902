"""The past of any method as one more setting, ``replay``: samples of earlier tasks in half of each later batch.

They are labelled with the classes that their task annotates. ``generated`` is the generator of CGR
(:mod:`perdure.methods.cgr.generator`), ``impressions`` are optimised against the network of before
(:mod:`perdure.methods.ccsi_seg.past`), ``exemplars`` are real training samples (:mod:`perdure.methods.exemplars`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.engine.phases import Phase, Terms
from perdure.errors import UsageError
from perdure.methods import training
from perdure.methods.ccsi_seg.past import ClassImpressions, ImpressionOptions
from perdure.methods.cgr.options import GeneratorOptions, PairOptions
from perdure.methods.cgr.prompts import MOST_CLASSES
from perdure.methods.exemplars import ExemplarOptions, Exemplars
from perdure.methods.method import Method
from perdure.methods.options import Options, OptionsT
from perdure.methods.past import Judge, Nothing, Past, mixed, need_room
from perdure.networks.network import FeaturesT, GrowingNetwork
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task


class ReplayOptions(Options):
    """What a method replays."""

    replay: Literal["none", "generated", "impressions", "exemplars"] = Field(
        "none",
        description="images of earlier tasks, which fill half of each batch: none; image-mask pairs that a diffusion "
        "network generates (generated); images optimised until the network of before the task sees old classes in "
        "them (impressions); or real training samples, so that patient data stays in the run (exemplars)",
    )
    generator: GeneratorOptions = Field(GeneratorOptions(), description="replay=generated: the generator of pairs")
    pairs: PairOptions = Field(PairOptions(), description="replay=generated: what it makes")
    impressions: ImpressionOptions = Field(
        ImpressionOptions(), description="replay=impressions: how they are made from statistics and the network"
    )
    exemplars: ExemplarOptions = Field(
        ExemplarOptions(), description="replay=exemplars: the training data that stays, of patients too"
    )

    @property
    def most_classes(self) -> int | None:
        """Classes that one task may annotate; ``None`` for any number."""
        return MOST_CLASSES if self.replay == "generated" else None

    def unused(self) -> list[str]:
        """Sections of another kind of replay than the one that was chosen."""
        kinds = {"generator": "generated", "pairs": "generated", "impressions": "impressions", "exemplars": "exemplars"}
        return [
            f"method.{section} is set, but not used: method.replay is {self.replay}, not {kind}"
            for section, kind in kinds.items()
            if kind != self.replay and getattr(self, section) != type(self).model_fields[section].default
        ]


def make_past(options: ReplayOptions, network: GrowingNetwork[FeaturesT], batch_size: int) -> Past:
    """The past that the options ask for.

    Raises:
        UsageError: Pairs are asked of a network without 2D masks, or batches have no room for them.
    """
    if options.replay == "none":
        return Nothing()
    need_room(batch_size)
    if options.replay == "exemplars":
        return Exemplars(options.exemplars)
    if not isinstance(network, Segmenter) or network.dims != 2:
        raise UsageError(
            f"replay={options.replay} makes images with masks: it needs a 2D network for segmentation",
            "use volumes.view=slices for volumes, or replay=none",
        )
    if options.replay == "impressions":
        return ClassImpressions(options.impressions, network)
    from perdure.methods.cgr.generator import PairGenerator  # needs the extra `diffusion`

    return PairGenerator(options.generator, options.pairs, network.in_channels or 3)


def training_data(owner: Method[OptionsT], past: Past, task: Task) -> Batches | Mix:
    """What a method trains on: the task's data, and in half of each later batch the past, if there is one."""
    return mixed(task, past.samples(owner, task), owner.training_options.batch_size)


def training_phases(
    owner: Method[OptionsT],
    past: Past,
    network: GrowingNetwork[Tensor],
    task: Task,
    loss: Callable[[Batch], Terms],
) -> Sequence[Phase]:
    """The training phase of ``loss``, with those of the past around it."""

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = network.encode(images.to(_device(network))).features
        return F.adaptive_avg_pool2d(found, 4).flatten(1)

    def labels(images: Tensor) -> Tensor:
        return owner.predict(images.to(_device(network))).labels()

    # the network alone where the past has weights, for these have a phase of their own
    ours = set(map(id, network.parameters()))
    module = owner if all(id(p) in ours for p in owner.parameters()) else network
    data = partial(training_data, owner, past, task)
    train = training.train_phase(module, network, task, owner.training_options, loss, data)
    return [*past.learn(owner, task), train, *past.generate(owner, task, Judge(features, labels))]


def _device(network: GrowingNetwork[FeaturesT]) -> torch.device:
    return next(network.parameters()).device
