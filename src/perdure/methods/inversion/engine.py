"""The inversion loop: Adam on pixels, settled groups, random shifts, saved progress; and the image priors.

Images come in groups ``(g, B, C, H, W)``. The loss of a group depends on that group alone, so the sum over groups is
minimised and each group is optimised as if alone, however many share a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.engine.phases import Progress
from perdure.errors import PerdureError
from perdure.seeds import derive_seed

CHECKPOINT_EVERY: Final = 20
"""Steps between two calls of ``progress.checkpoint``."""

GroupLoss = Callable[[Tensor, int], Tensor]
"""Images ``(g, B, C, H, W)`` and the number of the step -> loss of each group ``(g,)``."""


def warmup_cosine(step: int, steps: int, lr: float, warmup: int = 0, decay: float = 0.5) -> float:
    """Learning rate of a step: a linear rise to ``lr``, then half a cosine from ``2 lr decay`` to 0 (spec 3.4)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return decay * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * lr


@dataclass(frozen=True)
class InversionSettings:
    """How images are optimised.

    Args:
        steps: Steps of Adam.
        rate: Learning rate of each step.
        betas: Decay rates of Adam's two averages.
        clamp: Limits the images in place after each step.
        keep: The images of the last step, or of the step with the lowest loss.
        warmup: Steps before the first window.
        settle_window: A group ends when its mean loss over so many steps no longer falls; ``None`` for never.
        settle_tolerance: Relative fall from window to window that counts as falling.
    """

    steps: int
    rate: Callable[[int], float]
    betas: tuple[float, float]
    clamp: Callable[[Tensor], object]
    keep: Literal["last", "best"] = "last"
    warmup: int = 0
    settle_window: int | None = None
    settle_tolerance: float = 0.0


class InversionBatch(nn.Module):
    """Groups of images that are optimised in one tensor.

    A group that has settled stays in the tensor, and its result is kept aside: the others do not get slower, and
    torch's Adam needs no surgery on its state.

    Args:
        start: Images to start from ``(g, B, C, H, W)``.
        loss: Loss of each group.
        settings: How they are optimised.

    Attributes:
        images: Images under way.
        kept: Result so far, final for groups with ``steps > 0``.
        steps: Steps that a finished group took ``(g,)`` int64; 0 for a group under way.
        least: Lowest loss so far ``(g,)``.
        latest: Loss of the last step ``(g,)``.
        done: Whether all groups are finished.
    """

    kept: Tensor
    steps: Tensor
    least: Tensor
    latest: Tensor
    window_sum: Tensor
    window_before: Tensor

    def __init__(self, start: Tensor, loss: GroupLoss, settings: InversionSettings) -> None:
        super().__init__()
        self.loss, self.settings, self.done = loss, settings, False
        self.images = nn.Parameter(start.clone())
        # A hand-written Adam saved 3 % of a step in fp32 and 6 % with bf16 products (benchmarks/README.md); the fused
        # one saves nothing on a CPU.
        self.optimizer = torch.optim.Adam([self.images], betas=settings.betas)
        self.register_buffer("kept", start.clone())
        self.register_buffer("steps", torch.zeros(len(start), dtype=torch.int64, device=start.device))
        for name in ("least", "latest", "window_sum", "window_before"):
            self.register_buffer(name, torch.full((len(start),), torch.inf, device=start.device))

    def advance(self, first: int, last: int) -> None:
        """Take the steps from ``first`` up to, but not including, ``last``."""
        for step in range(first, last):
            if self.done:
                return
            self.optimizer.param_groups[0]["lr"] = self.settings.rate(step)
            # Without autocast: variances are differences of moments, of which half precision would leave little.
            with torch.enable_grad(), torch.autocast(self.images.device.type, enabled=False):
                loss = self.loss(self.images, step)
                (self.images.grad,) = torch.autograd.grad(loss.sum(), self.images)
            self.optimizer.step()
            with torch.no_grad():
                self.settings.clamp(self.images)
                self._record(loss.detach(), step)

    def _record(self, loss: Tensor, step: int) -> None:
        """Keep what is to be kept after a step, and finish groups that have settled or are at the last step."""
        settings, active = self.settings, self.steps == 0
        self.latest = torch.where(active, loss, self.latest)
        if settings.keep == "best":
            better = active & (loss < self.least)
            self._keep(better)
            self.least = torch.where(better, loss, self.least)
        ended = active if step + 1 == settings.steps else None
        if settings.settle_window is not None and ended is None:
            past = step + 1 - settings.warmup
            self.window_sum = loss if past == 1 else self.window_sum + loss
            if past > 0 and past % settings.settle_window == 0:
                mean, before = self.window_sum / settings.settle_window, self.window_before
                self.window_before, self.window_sum = mean, torch.zeros_like(mean)
                if past > settings.settle_window:  # there is a window before to compare with
                    ended = active & (before - mean <= settings.settle_tolerance * before.abs())
        if ended is not None:
            if settings.keep == "last":
                self._keep(ended)
            self.steps = torch.where(ended, step + 1, self.steps)
            self.done = bool((self.steps > 0).all())

    def _keep(self, which: Tensor) -> None:
        self.kept = torch.where(which.view(-1, 1, 1, 1, 1), self.images, self.kept)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on to the same bits."""
        return {"groups": self.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved :meth:`state`."""
        self.load_state_dict(state["groups"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = bool((self.steps > 0).all())


def invert(
    batches: Sequence[InversionBatch], steps: int, progress: Progress | None = None, request: object = None
) -> tuple[Tensor, Tensor]:
    """Optimise batches side by side to their end.

    Args:
        batches: At their first step; a saved state in ``progress`` is restored.
        steps: Most steps, those of the batches' settings.
        progress: Shows progress and saves the work.
        request: Saved with the work as ``request``: what the caller needs to build the same batches again.

    Returns:
        Images ``(G, B, C, H, W)`` of all groups, and the steps that each took ``(G,)`` int64 on the CPU.

    Raises:
        PerdureError: A loss is not finite.
        Interrupted: The progress was asked to stop; the work is saved.
    """
    done = 0
    if progress is not None and progress.saved is not None:
        done = int(progress.saved["done"])
        for batch, state in zip(batches, progress.saved["batches"], strict=True):
            batch.restore(state)
    if batches[0].images.device.type == "cpu":
        # glibc keeps freed memory up to twice the largest block ever given back (at most 64 MiB). Without this block
        # each step returns the memory of its feature maps to the system and fetches it again page by page.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    while done < steps and not all(batch.done for batch in batches):
        until = min(done + CHECKPOINT_EVERY, steps)
        for batch in batches:
            batch.advance(done, until)
        done = until
        check_loss(torch.cat([batch.latest for batch in batches]))
        if progress is not None and done < steps:
            active = torch.cat([batch.latest[batch.steps == 0] for batch in batches])
            note = f"loss {active.mean().item():.3f}" if len(active) else "all settled"
            progress.checkpoint(done, steps, note, partial(_state, done, batches, request))
    return torch.cat([batch.kept for batch in batches]), torch.cat([batch.steps for batch in batches]).cpu()


def _state(done: int, batches: Sequence[InversionBatch], request: object) -> dict[str, object]:
    return {"done": done, "batches": [batch.state() for batch in batches], "request": request}


def check_loss(loss: Tensor) -> Tensor:
    """Return the loss, or raise PerdureError if it is not finite."""
    if not torch.isfinite(loss).all():
        raise PerdureError(
            "the loss of the synthesis is not finite", "lower synthesis.lr, or look at the losses of the task before"
        )
    return loss


# Shifts ---------------------------------------------------------------------------------------------------------------


class JitterFlip:
    """Random circular shifts and left-right flips, one per group and step.

    Part of the graph: measured on 2 × 40 images of 3 × 32 × 32, roll and flip under autograd take 0.30 ms both ways,
    a gather outside the graph and its inverse 0.41 ms, of a step of 117 ms.

    Args:
        numbers: Number of each group; with the seed and the step it decides the move.
        steps: Steps to draw moves for.
        jitter: Largest shift in pixels along either axis.
        flip: Flip half of the steps.
        seed: Of the request.

    Attributes:
        table: Shift down, shift right and flip (0 or 1) ``(g, steps, 3)`` int64.
    """

    def __init__(self, numbers: Sequence[int], steps: int, jitter: int, flip: bool, seed: int) -> None:
        drawn = []
        for number in numbers:
            generator = torch.Generator().manual_seed(derive_seed(seed, "moves", number))
            shifts = torch.randint(-jitter, jitter + 1, (steps, 2), generator=generator)
            drawn.append(torch.cat([shifts, (torch.rand(steps, generator=generator) < 0.5 * flip)[:, None]], 1))
        self.table = torch.stack(drawn)

    def __call__(self, images: Tensor, step: int) -> Tensor:
        """Shift, then flip: ``(g, B, C, H, W)`` -> the same shape."""
        moved = []
        for group, (down, right, flip) in zip(images, self.table[:, step].tolist(), strict=True):
            rolled = group.roll((down, right), (2, 3))
            moved.append(rolled.flip(3) if flip else rolled)
        return torch.stack(moved)


def shift(maps: Tensor, down: int, right: int, fill: float) -> Tensor:
    """Shift ``(..., H, W)`` by whole pixels; ``fill`` enters at the border. For anatomy, where left is not right."""
    return F.pad(maps, (right, -right, down, -down), value=fill)


# Priors of groups of images -------------------------------------------------------------------------------------------


def differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differences of neighbours in ``(N, C, H, W)``: along rows, along columns, along both diagonals."""
    return (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )


def tv1(images: Tensor, groups: int = 1) -> Tensor:
    """TV₁: sum over four directions of the mean absolute difference (spec 3.3); independent of number and size.

    Args:
        images: ``(groups * B, C, H, W)``.
        groups: Number of groups; 1 is the published form, ``len(images)`` gives one value per image.

    Returns:
        ``(groups,)``, in the unit of the images.
    """
    return torch.stack([part.reshape(groups, -1).abs().mean(1) for part in differences(images)]).sum(0)


def tv2(images: Tensor, groups: int = 1) -> Tensor:
    """TV₂: sum over four directions of the norm of all differences of a group (spec 3.3); arguments as in :func:`tv1`.

    Not squared, so it grows with √B and with the side of the images; its weight belongs to a group size. The gradient
    is 0 where all differences of a direction vanish.
    """
    parts = [torch.linalg.vector_norm(part.reshape(groups, -1), dim=1) for part in differences(images)]
    return torch.stack(parts).sum(0)


def l2(images: Tensor, groups: int = 1) -> Tensor:
    """Mean over the images of a group of their norm ‖x‖₂, not squared (spec 3.3); arguments as in :func:`tv1`."""
    norms: Tensor = torch.linalg.vector_norm(images, dim=(1, 2, 3))
    return norms.view(groups, -1).mean(1)
