"""Synthesis of class impressions: images optimised until the frozen network takes them for their class (spec 3).

Groups of images are optimised side by side; what happens to a group depends on the seed, the group's number and
the step alone, not on how many groups run together, in what order, or in how many threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from perdure.engine.phases import Progress
from perdure.errors import PerdureError
from perdure.methods.ccsi.lots import InversionBatch
from perdure.methods.ccsi.objective import Objective
from perdure.methods.options import Options
from perdure.networks.classifier import Classifier
from perdure.seeds import derive_seed

BETWEEN_TICKS: Final = 20
"""Steps between two looks at the progress."""
CPU_PIXELS: Final = 2 * 40 * 32 * 32
"""Pixels of the images that a CPU takes in one tensor: few enough for its cache, enough for several threads."""


class SynthesisOptions(Options):
    """How impressions are made. Defaults are the clean profile; :data:`FAITHFUL` holds the published values."""

    steps: int = Field(1000, ge=1, description="optimisation steps of a group; published 5000")
    group_size: int = Field(
        40, ge=2, description="images whose moments are matched together; TV and moments depend on it"
    )
    groups_at_once: int = Field(8, ge=1, description="groups optimised side by side; changes memory and speed only")
    lr: float = Field(0.05, gt=0, description="base learning rate of Adam")
    betas: tuple[float, float] = Field((0.5, 0.9), description="decay rates of Adam's two averages")
    warmup: int = Field(100, ge=0, description="steps in which the learning rate rises to its base")
    decay: float = Field(
        0.5, gt=0, description="learning rate after the warm-up, times 2 base: 0.5 goes on from the base; published 0.2"
    )
    jitter: int = Field(2, ge=0, description="largest circular shift in pixels along each axis; published 30")
    flip: bool = Field(False, description="mirror half of the steps left to right; published true")
    kappa: float = Field(1.0, ge=0, description="weight of cross-entropy")
    tv1: float = Field(0.0, ge=0, description="weight of total variation, mean absolute differences")
    tv2: float = Field(
        0.01, ge=0, description="weight of total variation, norms of differences; published 0.001 to 0.1"
    )
    l2: float = Field(0.1, ge=0, description="weight of the images' norms")
    moments: float = Field(1.0, ge=0, description="weight of the distance to the running statistics")
    first_layer: float = Field(10.0, ge=0, description="weight of the first normalisation layer in it, others have 1")
    statistics: Literal["none", "position", "class"] = Field(
        "class",
        description="moments of single images to match: none, those kept of each class, or (published, without "
        "gradient) those of the last training batch by position; other than none needs Continual Normalization",
    )
    statistics_weight: float = Field(1.0, ge=0, description="weight of the distance to them")
    start: Literal["mean", "noise"] = Field(
        "mean", description="start from class means with noise, or from noise alone"
    )
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise on class means")
    clamp: Literal["range", "channel0"] = Field(
        "range", description="clip all channels to 0..1, or (published) the first to ImageNet's standardised range"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="images of the last step, or (published) of the one with the lowest loss under jitter"
    )
    targets: Literal["balanced", "random"] = Field(
        "balanced", description="classes in turn, or (published) each image's class drawn at random"
    )
    settle_window: int | None = Field(
        None, ge=1, description="stop a group when its mean loss over so many steps no longer falls; none: never"
    )
    settle_tolerance: float = Field(0.01, ge=0, lt=1, description="relative fall from window to window that counts")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of products in convolutions, all else is fp32; auto: bf16 on a CPU that multiplies it natively",
    )

    @model_validator(mode="after")
    def _check(self) -> SynthesisOptions:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and less than 1")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear rise, then half a cosine to 0 (spec 3.4)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        through = (step - self.warmup) / (self.steps - self.warmup)
        return self.decay * (1 + math.cos(math.pi * through)) * self.lr


FAITHFUL: Final[dict[str, Any]] = {
    "steps": 5000,
    "decay": 0.2,
    "jitter": 30,
    "flip": True,
    "statistics": "position",
    "clamp": "channel0",
    "keep": "best",
    "targets": "random",
    "precision": "fp32",
}
"""What the published code does where the clean profile does otherwise (spec 3.3, 3.4, 7.2 Q4 and J3)."""


@dataclass(frozen=True)
class Request:
    """Which impressions to make.

    Args:
        targets: Channel of each image ``(G, B)`` int64, a row a group; see :func:`plan_groups`.
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
    rows = [
        torch.randint(classes, (options.group_size,), generator=_generator(seed, "targets", number))
        for number in range(groups)
    ]
    return torch.stack(rows)


def start_images(job: Request, options: SynthesisOptions) -> Tensor:
    """Images to start from ``(G * B, C, H, W)`` on the device of the means (spec 3.2).

    The class mean plus noise of standard deviation ``noise``; or standard normal noise alone.

    Raises:
        PerdureError: A mean has numbers that are not finite.
    """
    if options.start == "mean" and not torch.isfinite(job.means).all():
        raise PerdureError(
            "a class mean image has numbers that are not finite", "look at the images of that class for broken files"
        )
    size = (job.targets.shape[1], *job.means.shape[1:])
    noise = [torch.randn(size, generator=_generator(job.seed, "noise", number)) for number in job.numbers]
    drawn = torch.cat(noise).to(job.means.device)
    if options.start == "noise":
        return drawn
    return job.means.float()[job.targets.flatten().to(job.means.device)] + options.noise * drawn


def synthesise(
    teacher: Classifier, job: Request, options: SynthesisOptions, progress: Progress | None = None
) -> Impressions:
    """Make impressions on the teacher's device.

    Args:
        teacher: Is not changed and gets no gradients; it is used as in evaluation mode.
        job: What to make.
        options: How.
        progress: Shows progress and saves the work; a saved one goes on where it was, to the same result.

    Raises:
        PerdureError: The teacher or the means hold numbers that are not finite, or the loss stops being finite.
        UsageError: The statistics asked for do not exist.
        Interrupted: The progress was asked to stop; the work is saved.
    """
    device = teacher.head.scale.device
    objective = Objective(teacher, options, job.moments, _half(options, device))
    if progress is None or progress.saved is None:
        done, lots = 0, _lots(job, options, device)
    else:
        done, lots = (
            int(progress.saved["done"]),
            [InversionBatch.restore(lot, device) for lot in progress.saved["lots"]],
        )
    if device.type == "cpu":
        _hold_memory()
    while done < options.steps and any(lot.rows for lot in lots):
        until = min(done + BETWEEN_TICKS, options.steps)
        for lot in lots:
            lot.advance(objective, options, job.seed, done, until)
        done, note = until, _progress(lots)
        if progress is not None and done < options.steps:
            progress.checkpoint(done, options.steps, note, partial(_state, done, lots))
    return _collect(job, lots, Objective(teacher, options, job.moments))


def _lots(job: Request, options: SynthesisOptions, device: torch.device) -> list[InversionBatch]:
    """On a GPU all groups in one tensor; on a CPU as many as its cache likes, and at least one."""
    groups, size = job.targets.shape
    images = start_images(job, options).to(device)
    images = images.view(groups, size, *images.shape[1:])
    targets = job.targets.to(device)
    each = max(1, CPU_PIXELS // images[0, :, 0].numel()) if device.type == "cpu" else groups
    parts = [slice(i, min(i + each, groups)) for i in range(0, groups, each)]
    return [
        InversionBatch.begin(range(groups)[p], job.numbers[p], targets[p], images[p].clone(), options.keep == "best")
        for p in parts
    ]


def _half(options: SynthesisOptions, device: torch.device) -> bool:
    """Whether convolutions compute in bfloat16. On a GPU the casts cost more launches than the products save."""
    if options.precision != "auto":
        return options.precision == "bf16"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # newer than the oldest torch that will do
    return device.type == "cpu" and native is not None and bool(native())


def _hold_memory() -> None:
    """Make glibc keep freed memory for the next step.

    It keeps up to twice the largest block that was ever given back, at most 64 MiB. Otherwise every step returns the
    memory of its maps to the system and fetches it again page by page, which costs a sixth of the time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _state(done: int, lots: Sequence[InversionBatch]) -> dict[str, object]:
    return {"done": done, "lots": [lot.state() for lot in lots]}


def _progress(lots: Sequence[InversionBatch]) -> str:
    """Mean loss of the groups under way, in words.

    Raises:
        PerdureError: It is not finite.
    """
    latest = [lot.latest for lot in lots if lot.rows]
    return f"loss {_finite(torch.cat(latest)).mean().item():.3f}" if latest else "all settled"


def _finite(loss: Tensor) -> Tensor:
    if not torch.isfinite(loss).all():
        raise PerdureError(
            "the loss of the synthesis is not finite", "lower synthesis.lr, or look at the losses of the task before"
        )
    return loss


@torch.no_grad()
def _collect(job: Request, lots: Sequence[InversionBatch], objective: Objective) -> Impressions:
    """Finished groups in the order of the job, and the loss of each by itself."""
    finished = sorted((done for lot in lots for done in lot.finished), key=lambda done: done.row)
    device = finished[0].images.device
    targets = job.targets.to(device)
    terms = [objective.terms(done.images, targets[i : i + 1]) for i, done in enumerate(finished)]
    return Impressions(
        torch.cat([done.images for done in finished]),
        targets.flatten(),
        {name: _finite(torch.cat([part[name] for part in terms])) for name in terms[0]},
        torch.tensor([done.steps for done in finished]),
    )


def _generator(seed: int, what: str, number: int) -> torch.Generator:
    """Random numbers of one group; on the CPU, so that every device gets the same."""
    return torch.Generator().manual_seed(derive_seed(seed, what, number))
