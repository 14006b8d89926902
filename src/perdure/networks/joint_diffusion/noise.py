"""The noise of the diffusion: how it is added, and the samplers that take it away (spec CGR 2.1, 2.5)."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from perdure.networks.joint_diffusion.extra import need

STEPS: Final = 1000
"""Levels of noise in training."""
FIRST, LAST = 0.0015, 0.0205  # β of the first and of the last level; their roots are equally far apart
Sampler = Literal["ddim", "dpm"]


@cache
def kept_signal() -> Tensor:
    """Share ᾱ of the signal's variance that is left at each level, ``(1000,)`` float32."""
    return (1.0 - torch.linspace(FIRST**0.5, LAST**0.5, STEPS).square()).cumprod(0)


def add_noise(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """``√ᾱ z + √(1 − ᾱ) ε`` for each sample: ``(N, ...)``, ``(N, ...)``, ``(N,)`` int64 -> ``(N, ...)``."""
    share = kept_signal().to(clean.device)[times].view(-1, *[1] * (clean.ndim - 1))
    return share.sqrt() * clean + (1.0 - share).sqrt() * noise


def scheduler(sampler: Sampler, steps: int) -> Any:
    """A diffusers scheduler that is ready for ``steps`` steps.

    ``ddim`` is the published one: deterministic, 990, 980, …, 0 for 100 steps, the predicted pair clipped to
    [−1, 1] at every step. ``dpm`` is DPM-Solver++ (Lu et al. 2022) of second order with the same cut, for 20 to 25
    steps.
    """
    betas = {"num_train_timesteps": STEPS, "beta_schedule": "scaled_linear", "beta_start": FIRST, "beta_end": LAST}
    diffusers = need("diffusers")
    if sampler == "ddim":
        made = diffusers.DDIMScheduler(
            **betas,
            clip_sample=True,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type="epsilon",
            timestep_spacing="leading",
        )
    else:
        made = diffusers.DPMSolverMultistepScheduler(
            **betas,
            algorithm_type="dpmsolver++",
            solver_order=2,
            prediction_type="epsilon",
            lower_order_final=True,
            # with a largest value of 1 the library's dynamic threshold is a plain cut to [−1, 1], as ddim has it;
            # without it the pairs of a network that is not fully trained run away
            thresholding=True,
            sample_max_value=1.0,
        )
    made.set_timesteps(steps)
    return made
