"""Generated pairs as the past of any method for images: one more setting, ``replay: generated``.

The generator is that of CGR (:mod:`perdure.methods.cgr.generator`). Half of each batch of a later task are pairs of
earlier tasks, labelled with the classes that their task annotates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from perdure.data.case import Batch, annotation_table
from perdure.data.sampling import Batches, Mix
from perdure.engine.phases import Phase, Terms
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.cgr.copies import Judge
from perdure.methods.cgr.options import GeneratorOptions, PairOptions
from perdure.methods.cgr.pairs import mixed
from perdure.methods.method import Method
from perdure.methods.options import Options, OptionsT
from perdure.networks.network import FeaturesT, GrowingNetwork
from perdure.streams.task import Task

if TYPE_CHECKING:
    from perdure.methods.cgr.generator import PairGenerator  # needs the extra `diffusion` where it is used


class ReplayOptions(Options):
    """What a method replays."""

    replay: Literal["none", "generated"] = Field(
        "none",
        description="images of earlier tasks: none, or image-mask pairs that a diffusion network generates, which fill "
        "half of each batch",
    )
    generator: GeneratorOptions = Field(GeneratorOptions(), description="replay=generated: the generator of pairs")
    pairs: PairOptions = Field(PairOptions(), description="replay=generated: what it makes")


def make_generator(options: ReplayOptions, network: GrowingNetwork[FeaturesT]) -> PairGenerator | None:
    """The generator that the options ask for. Raises UsageError where the network is not one for images and masks."""
    if options.replay == "none":
        return None
    if network.kind != "segmentation" or network.dims != 2:
        raise UsageError(
            "replay=generated makes images with masks: it needs a 2D network for segmentation",
            "use volumes.view=slices for volumes, or replay=none",
        )
    from perdure.methods.cgr.generator import PairGenerator

    return PairGenerator(options.generator, options.pairs, network.in_channels or 3)


def training_data(owner: Method[OptionsT], generator: PairGenerator | None, task: Task) -> Batches | Mix:
    """What a method trains on: the task's data, and in half of each later batch pairs where there is a generator."""
    if generator is None:
        return training.batches(task, owner.training_options)
    return mixed(task, generator.past(owner, task), owner.training_options.batch_size)


def phases_with_pairs(
    owner: Method[OptionsT],
    generator: PairGenerator | None,
    network: GrowingNetwork[Tensor],
    task: Task,
    loss: Callable[[Batch], Terms],
) -> Sequence[Phase]:
    """The training phase of ``loss``, with those of the generator around it where there is one."""
    options = owner.training_options
    if generator is None:
        return [training.train_phase(owner, network, task, options, loss)]

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = network.encode(images.to(generator.iteration.device)).features
        return F.adaptive_avg_pool2d(found, 4).flatten(1)

    def labels(images: Tensor) -> Tensor:
        return owner.predict(images.to(generator.iteration.device)).labels()

    # the network alone, for the generator has a phase of its own
    train = training.train_phase(network, network, task, options, loss, partial(training_data, owner, generator, task))
    return [*generator.learn(owner, task), train, *generator.generate(owner, task, Judge(features, labels))]


def told(batch: Batch, generator: PairGenerator | None) -> Batch:
    """A batch whose samples say which classes their labels can tell: those of the task that each is from."""
    if generator is None or batch.parts is None:
        return batch
    *earlier, present = generator.cards
    table = annotation_table([one.ids for one in (present, *earlier)])
    assert table is not None
    own = table.to(batch.parts.device)[batch.parts]
    return batch._replace(annotated=own if batch.annotated is None else own & batch.annotated)


def parted(batch: Batch) -> tuple[Batch, Batch]:
    """The samples of the present task, and those that are replayed."""
    assert batch.parts is not None
    return batch.where(batch.parts == 0), batch.where(batch.parts > 0)


def kept_pairs(generator: PairGenerator | None) -> list[Kept]:
    """What the generator of a method keeps, under the method's attribute ``generator``."""
    return [] if generator is None else generator.kept("generator.")
