"""Settings that every method shares, and what a method receives when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from perdure.errors import UsageError

if TYPE_CHECKING:
    from perdure.networks.network import Network  # the command line reads these settings without torch

NetworkT = TypeVar("NetworkT", bound="Network")


class Options(BaseModel):
    """Base of all option models: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def unused(self) -> list[str]:
        """What was set although another setting makes it void, a line each, for people."""
        return []


OptionsT = TypeVar("OptionsT", bound="Options")
Share = Annotated[float, Field(ge=0)]
Step = Annotated[float, Field(gt=0)]


class TrainingOptions(Options):
    """Optimisation of every task; the defaults are STAR's on VOC (spec 1.6, 5.1)."""

    epochs: int = Field(60, ge=1, description="epochs of the first task")
    later_epochs: int | None = Field(None, ge=1, description="epochs of later tasks; the same as `epochs` if not given")
    steps: int | None = Field(None, ge=1, description="optimiser steps of the first task, in the place of epochs")
    later_steps: int | None = Field(
        None, ge=1, description="optimiser steps of later tasks; the same as `steps` if not given"
    )
    batch_size: int = Field(24, ge=1, description="samples a step over all processes together")
    optimizer: Literal["sgd", "adamw", "adam"] = Field(
        "sgd", description="which optimiser; the weight decay of adam is part of the gradient"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, after Nesterov; 0 for plain SGD")
    lr: float = Field(1e-3, gt=0, description="base learning rate of the first task")
    later_lr: float | None = Field(None, gt=0, description="base learning rate of later tasks; lr / 10 if not given")
    weight_decay: float = Field(1e-4, ge=0, description="of all trained weights")
    schedule: Literal["constant", "poly", "warmup_poly", "cosine", "stairs"] = Field(
        "poly", description="learning rate over the steps of a task; poly has power 0.9"
    )
    stairs: tuple[Share, Step, Step] = Field(
        (0.07, 0.06, 0.3),
        description="schedule stairs: share of the steps before the first stair, between two, and the factor of each",
    )
    warmup: float = Field(0.2, gt=0, lt=1, description="share of the steps that warm up (warmup_poly)")
    warmup_steps: int | None = Field(
        None,
        ge=1,
        description="number of steps that warm up (warmup_poly), in the place of the share; a task with fewer ends "
        "while it still warms up",
    )
    neck_lr: float = Field(
        10.0, gt=0, description="learning rate of the head below the classifiers, or of a decoder, times base"
    )
    classifier_lr: float = Field(10.0, gt=0, description="learning rate of classifiers, times base")
    new_classifier_lr: float = Field(
        100.0, gt=0, description="learning rate of the newest classifier later, times base"
    )
    scale_lr: float = Field(
        1.0,
        gt=0,
        description="learning rate of the scale of cosine logits, times base; for networks with a cosine head",
    )
    freeze_norm: bool = Field(True, description="freeze BatchNorm after the first task")
    freeze_dropout: bool = Field(True, description="switch dropout off after the first task")
    pos_weight: float = Field(4.0, gt=0, description="weight of positive pixels in binary cross-entropy")
    clip: float | None = Field(None, gt=0, description="largest global gradient norm")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights")
    accumulate: int = Field(1, ge=1, description="batches a step")


@dataclass(frozen=True)
class Setup(Generic[OptionsT]):
    """What a method is built from.

    Args:
        options: The method's own ``Options``.
        training: Settings shared by all methods.
        build: Builds the recipe's network, without classifiers; ``begin`` grows them.
        weights: What the recipe's network starts from, also where a sealed task is restored and nothing is loaded. In
            a finished run a file is known by its name alone.
    """

    options: OptionsT
    training: TrainingOptions
    build: Callable[[], Network]
    weights: str = "random"

    def network(self, wanted: type[NetworkT]) -> NetworkT:
        """Build the recipe's network for a method that needs one of the type ``wanted``, such as ``Segmenter``.

        A network that has no classifiers of its own gets some where the method needs them: a recipe for one method runs
        with others too.

        Raises:
            UsageError: The recipe names a network of another type, or one that cannot be built.
        """
        network = self.build()
        if not isinstance(network, wanted):
            network = network.with_classifiers()
        if not isinstance(network, wanted):
            raise UsageError(
                f"the method needs a network of type {wanted.__name__}, the recipe's is a {type(network).__name__}",
                "set network.name to one that fits; `perdure list networks` shows them",
            )
        return network
