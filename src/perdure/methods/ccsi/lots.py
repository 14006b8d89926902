"""Lots: groups of images that are optimised in one tensor, step by step (spec 3.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor

from perdure.methods.ccsi.objective import Objective
from perdure.seeds import derive_seed

if TYPE_CHECKING:
    from perdure.methods.ccsi.synthesis import SynthesisOptions

EPS: Final = 1e-8
IMAGENET_RANGE: Final = ((0 - 0.485) / 0.229, (1 - 0.485) / 0.229)
"""Bounds of the published clip: ImageNet's first channel, standardised (Q4)."""


@dataclass
class Finished:
    """A group that is done: its row in the job, its images ``(B, C, H, W)``, and the steps it took."""

    row: int
    images: Tensor
    steps: int


@dataclass
class InversionBatch:
    """Groups under way.

    Args:
        rows: Row of each group in the job.
        numbers: Number of each group, which its draws depend on.
        targets: ``(g, B)``.
        images: ``(g, B, C, H, W)``; so are the following three.
        average: Adam's average of gradients.
        squares: Adam's average of squared gradients.
        best: Images of the best step so far; only kept with ``keep: best``.
        least: Lowest loss so far ``(g,)``.
        latest: Loss of the last step ``(g,)``.
        summed: Loss summed over the current window ``(g,)``.
        before: Mean loss of the window before ``(g,)``.
        finished: Groups that are done.
    """

    rows: list[int]
    numbers: list[int]
    targets: Tensor
    images: Tensor
    average: Tensor
    squares: Tensor
    best: Tensor
    least: Tensor
    latest: Tensor
    summed: Tensor
    before: Tensor
    finished: list[Finished] = field(default_factory=list)

    @classmethod
    def begin(cls, rows: Sequence[int], numbers: Sequence[int], targets: Tensor, images: Tensor, best: bool) -> Self:
        """A lot at its first step.

        Args:
            rows: Row of each group in the job.
            numbers: Number of each group.
            targets: ``(g, B)``.
            images: Images to start from ``(g, B, C, H, W)``.
            best: Whether the best images are kept.
        """
        infinite = torch.full((len(rows),), torch.inf, device=images.device)
        return cls(
            rows=list(rows),
            numbers=list(numbers),
            targets=targets,
            images=images,
            average=torch.zeros_like(images),
            squares=torch.zeros_like(images),
            best=images.clone() if best else images[:, :0],
            least=infinite,
            latest=infinite.clone(),
            summed=torch.zeros_like(infinite),
            before=infinite.clone(),
        )

    def state(self) -> dict[str, Any]:
        """Everything as tensors, numbers and containers of them."""
        finished = [{"row": done.row, "images": done.images, "steps": done.steps} for done in self.finished]
        return {**self.__dict__, "finished": finished}

    @classmethod
    def restore(cls, state: Mapping[str, Any], device: torch.device) -> Self:
        """The lot whose :meth:`state` was saved, on a device."""
        moved: dict[str, Any] = {
            name: part.to(device) if isinstance(part, Tensor) else part for name, part in state.items()
        }
        finished = [Finished(done["row"], done["images"].to(device), done["steps"]) for done in state["finished"]]
        return cls(**{**moved, "finished": finished})

    def advance(self, objective: Objective, options: SynthesisOptions, seed: int, first: int, last: int) -> None:
        """Take the steps from ``first`` up to, but not including, ``last``."""
        moves = JitterFlip(self.numbers, self.images.shape[-2:], options, seed, self.images.device)
        for step in range(first, last):
            if not self.rows:
                return
            moved = moves.there(self.images, step)
            loss, gradient = objective.gradient(moved.flatten(0, 1), self.targets)
            self._update(moves.back(gradient.view_as(moved), step), options, step)
            if options.keep == "best":
                better = loss < self.least
                self.best = torch.where(better[:, None, None, None, None], self.images, self.best)
                self.least = torch.where(better, loss, self.least)
            self.latest = loss
            self.summed += loss
            if self._settle(options, step):
                moves = JitterFlip(self.numbers, self.images.shape[-2:], options, seed, self.images.device)
        if last == options.steps:
            self._finish(torch.ones(len(self.rows), dtype=torch.bool), last, options)

    def _update(self, gradient: Tensor, options: SynthesisOptions, step: int) -> None:
        """One step of Adam, and the clip."""
        slow, fast = options.betas
        self.average.lerp_(gradient, 1 - slow)
        self.squares.mul_(fast).addcmul_(gradient, gradient, value=1 - fast)
        scale = (self.squares.sqrt() / (1 - fast ** (step + 1)) ** 0.5).add_(EPS)
        self.images.addcdiv_(self.average, scale, value=-options.rate(step) / (1 - slow ** (step + 1)))
        if options.clamp == "range":
            self.images.clamp_(0, 1)
        else:
            self.images[:, :, 0].clamp_(*IMAGENET_RANGE)

    def _settle(self, options: SynthesisOptions, step: int) -> bool:
        """At the end of a window: put aside the groups whose loss has settled. Whether there were any."""
        window, steps = options.settle_window, step + 1 - options.warmup
        if window is None:
            return False
        if steps == 0:
            self.summed.zero_()
        if steps <= 0 or steps % window:
            return False
        mean = self.summed / window
        settled = (self.before - mean <= options.settle_tolerance * self.before.abs()) & (steps > window)
        self.before, self.summed = mean, torch.zeros_like(mean)
        here = settled.cpu()
        if not here.any():
            return False
        self._finish(here, step + 1, options)
        return True

    def _finish(self, which: Tensor, steps: int, options: SynthesisOptions) -> None:
        """Put groups aside as finished, by a mask ``(g,)`` on the CPU."""
        source = self.best if options.keep == "best" else self.images
        for i in which.nonzero().flatten().tolist():
            self.finished.append(Finished(self.rows[i], source[i].clone(), steps))
        stay = (~which).nonzero().flatten()
        self.rows, self.numbers = [self.rows[i] for i in stay.tolist()], [self.numbers[i] for i in stay.tolist()]
        on_device = stay.to(self.images.device)
        for name in ("targets", "images", "average", "squares", "best", "least", "latest", "summed", "before"):
            setattr(self, name, getattr(self, name)[on_device])


class JitterFlip:
    """Random circular shifts and mirrorings of groups of images, one a group and step.

    The gradient is moved back by the inverse permutation of pixels, so the moves are no part of the graph.

    Args:
        numbers: Number of each group; with the seed and the step it decides the move.
        size: Height and width.
        options: ``steps``, ``jitter`` and ``flip``.
        seed: Of the job.
        device: Where the images are.
    """

    def __init__(
        self, numbers: Sequence[int], size: Sequence[int], options: SynthesisOptions, seed: int, device: torch.device
    ) -> None:
        self.size, self.device, steps = tuple(size), device, options.steps
        drawn = []
        for number in numbers:
            generator = torch.Generator().manual_seed(derive_seed(seed, "moves", number))
            shifts = torch.randint(-options.jitter, options.jitter + 1, (steps, 2), generator=generator)
            flips = torch.rand(steps, generator=generator) < 0.5 * options.flip
            drawn.append(torch.cat([shifts, flips[:, None]], 1))
        self.table = torch.stack(drawn) if drawn else torch.zeros(0, steps, 3, dtype=torch.int64)

    def there(self, images: Tensor, step: int) -> Tensor:
        """Shift, then mirror: ``(g, B, C, H, W)`` -> the same shape."""
        if len(images) == 1:  # two plain copies are faster than a gather
            down, right, flip = self.table[0, step].tolist()
            rolled = images.roll((down, right), (3, 4)) if down or right else images
            return rolled.flip(4) if flip else rolled
        return self._permute(images, *self._sources(step))

    def back(self, images: Tensor, step: int) -> Tensor:
        """The inverse of :meth:`there`."""
        if len(images) == 1:
            down, right, flip = self.table[0, step].tolist()
            flipped = images.flip(4) if flip else images
            return flipped.roll((-down, -right), (3, 4)) if down or right else flipped
        rows, columns = self._sources(step)
        return self._permute(images, rows.argsort(1), columns.argsort(1))

    def _sources(self, step: int) -> tuple[Tensor, Tensor]:
        """Row and column that each row ``(g, H)`` and column ``(g, W)`` comes from."""
        height, width = self.size
        down, right, flip = self.table[:, step].unbind(1)
        columns = torch.arange(width).expand(len(flip), -1)
        columns = torch.where(flip[:, None] > 0, width - 1 - columns, columns)
        return (torch.arange(height) - down[:, None]) % height, (columns - right[:, None]) % width

    def _permute(self, images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        pixels = (rows[:, :, None] * self.size[1] + columns[:, None, :]).flatten(1).to(self.device, non_blocking=True)
        flat = images.flatten(3).flatten(1, 2)
        return flat.gather(2, pixels[:, None].expand_as(flat)).view_as(images)
