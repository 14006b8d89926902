"""The Bayesian joint diffusion loss: inputs and targets as pure functions (spec CGR 2.2).

Beside the pair with noise in both parts, the network sees the same pair with one part clean, at the same noise level.
Nothing tells it which part is clean; it has to answer zero noise there, and that counts in the mean.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from perdure.networks.joint_diffusion.noise import STEPS, add_noise

Clean = Literal["image", "mask"]
"""The part of a pair that stays as it is."""


class Passes(NamedTuple):
    """Passes stacked along the batch axis: P passes of N pairs.

    Args:
        inputs: ``(P N, C + 1, H, W)``.
        targets: The noise that the network has to find, of the same shape.
        times: ``(P N,)`` int64.
        passes: P.
    """

    inputs: Tensor
    targets: Tensor
    times: Tensor
    passes: int


def draw_times(number: int, device: torch.device) -> Tensor:
    """Noise levels ``(number,)`` int64, drawn anew for every pair at every step."""
    return torch.randint(STEPS, (number,), device=device)


def clean_parts(schedule: Literal["alternate", "both", "random", "none"], step: int) -> tuple[Clean, ...]:
    """The clean part of each conditional pass of a step: the image at even steps, the mask at odd ones."""
    turns: tuple[Clean, Clean] = ("image", "mask")
    if schedule == "alternate":
        return (turns[step % 2],)
    if schedule == "random":
        return (turns[int(torch.randint(2, ()))],)
    return turns if schedule == "both" else ()


def joint(pairs: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs ``(N, C + 1, H, W)`` with noise in both parts, and that noise."""
    noise = torch.randn_like(pairs)
    return add_noise(pairs, noise, times), noise


def conditional(pairs: Tensor, times: Tensor, clean: Clean) -> tuple[Tensor, Tensor]:
    """Pairs whose ``clean`` part is bit for bit as it was, and the noise of the other part, 0 in the clean one."""
    noise = torch.randn_like(pairs)
    part = slice(0, -1) if clean == "image" else slice(-1, None)
    noise[:, part] = 0.0
    noisy = add_noise(pairs, noise, times)
    noisy[:, part] = pairs[:, part]
    return noisy, noise


def passes(pairs: Tensor, times: Tensor, clean: tuple[Clean, ...]) -> Passes:
    """The joint pass and one conditional pass per entry of ``clean``, with noises of their own at the same levels."""
    made = [joint(pairs, times), *(conditional(pairs, times, part) for part in clean)]
    inputs, targets = (torch.cat(parts) for parts in zip(*made, strict=True))
    return Passes(inputs, targets, times.repeat(len(made)), len(made))


def losses(predicted: Tensor, made: Passes) -> dict[str, Tensor]:
    """Mean absolute error of each pass over all of its entries; two conditional passes count half each."""
    errors = (predicted.float() - made.targets.float()).abs().flatten(1).mean(1)
    first, *others = errors.chunk(made.passes)
    terms = {"joint": first.mean()}
    if others:
        terms["conditional"] = torch.stack([part.mean() for part in others]).mean()
    return terms
