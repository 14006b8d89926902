"""Every loss computes in float32, also under autocast and on logits and features of half precision.

The engine calls losses under autocast, where a product rounds to half precision; the network hands them logits and
features that are half already. Sums over a batch of papers then exceed what float16 can hold, or lose all but three
digits in bfloat16.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.methods import losses
from perdure.methods.ccsi import terms as ccsi
from perdure.methods.ccsi.impressions import Objective, Request, plan_groups, synthesise
from perdure.methods.ccsi.options import SynthesisOptions
from perdure.methods.ccsi_seg import terms as ccsi_seg
from perdure.methods.inversion import engine as inversion
from perdure.methods.inversion.norm_statistics import segment_norms
from perdure.methods.losses import class_bce, negative_bce
from perdure.methods.star import terms as star
from perdure.networks.cosine_resnet import cosine_resnet

LABELS = torch.randint(0, 4, (3, 64, 64), generator=torch.Generator().manual_seed(1))
CHANNELS = torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(2))
MASK = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) < 0.7
TARGETS = ccsi_seg.one_hot(LABELS - 1, 3)
ANNOTATED = torch.ones(3, 4096, dtype=torch.bool).index_fill_(1, torch.tensor([2]), False)


def values(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale


def bank(seed: int) -> Tensor:
    """Means and variances ``(2, R, T)``."""
    return values(2, 4, 30, seed=seed).abs()


# A loss, and what the network or other losses give it: tensors that autocast may have made half.
CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "class_bce": (lambda z: class_bce(z, LABELS, (1, 2, 3), 4.0), [values(3, 3, 16, 16, scale=4)]),
    "class_bce, masked": (
        lambda z: class_bce(z, LABELS, (1, 2, 3), 4.0, False, ANNOTATED),
        [values(3, 3, 64, 64, scale=4)],
    ),
    "negative_bce": (negative_bce, [values(3, 3, 64, 64, scale=4)]),
    "negative_bce, masked": (lambda z: negative_bce(z, MASK), [values(3, 3, 64, 64, scale=4)]),
    "replay_bce": (
        lambda w, b: star.replay_bce([values(900, 16, seed=5)] * 3, w.float(), b.float()),  # parameters are float32
        [values(3, 16), values(3)],
    ),
    "balance": (
        lambda *parts: torch.stack(star.balance(*(p.float() for p in parts))),
        [values(3).abs()] * 3 + [values(()).abs()] * 2,
    ),
    "ocfm": (lambda f, g: star.ocfm(f, g, MASK.float()), [values(3, 16, 64, 64), values(3, 16, 64, 64, seed=1)]),
    "sad": (
        lambda f: star.sad(f, LABELS[None] - 1, 3, F.normalize(values(2, 16, seed=4), dim=1)),
        [values(3, 16, 64, 64).abs()],
    ),
    "weighted_ce": (lambda z: ccsi.weighted_ce(z, CHANNELS, values(6, seed=1).abs()), [values(40, 6, scale=10)]),
    "less_forget": (ccsi.less_forget, [values(40, 64), values(40, 64, seed=1)]),
    "margin_ranking": (lambda s: ccsi.margin_ranking(s, CHANNELS, 4, 0.3, 2), [values(40, 6, scale=0.3)]),
    "centroids": (lambda s: ccsi.centroids(s, CHANNELS), [values(40, 6, scale=0.3)]),
    "idc": (lambda s, t: ccsi.idc(s, t, 0.1), [values(6, 6), values(6, 6, seed=1)]),
    "moving": (lambda c, d: ccsi.moving(c.float(), d.float(), 0.9), [values(6, 6), values(6, 6, seed=1)]),
    "balanced_bce": (lambda z: ccsi_seg.balanced_bce(z, TARGETS, MASK), [values(3, 3, 64, 64, scale=4)]),
    "dice_loss": (lambda z: ccsi_seg.dice_loss(z, TARGETS, MASK), [values(3, 3, 64, 64, scale=4)]),
    "pixel_margin": (lambda z: ccsi_seg.pixel_margin(z, LABELS, (1, 2), 1.0), [values(3, 3, 64, 64)]),
    "moment_loss": (
        lambda now, kept: ccsi_seg.moment_loss(now, kept, torch.arange(3).repeat_interleave(10), 10.0),
        [bank(0), bank(1)],
    ),
    "tv1": (lambda x: inversion.tv1(x.float(), 2), [values(4, 3, 32, 32)]),  # pixels under optimisation are float32
    "tv2": (lambda x: inversion.tv2(x.float(), 2), [values(4, 3, 32, 32)]),
    "l2": (lambda x: inversion.l2(x.float(), 2), [values(4, 3, 32, 32)]),
    "segment_norms": (lambda x: segment_norms(x.float(), torch.arange(30) // 10, 3), [values(4, 30)]),
}
NO_LOSS = {  # public functions of the modules of losses that have no precision of their own
    "channels_of", "annotates",  # ids
    "class_weights", "less_forget_weight",  # counts
    "edge_band", "one_hot", "agreement",  # labels
    "resizer", "enlarge", "shrink",  # matrices of interpolation, in the precision that they are asked for
    "pseudo_labels",  # tested below
    "shift", "differences", "warmup_cosine", "invert", "check_loss",
}  # fmt: skip


@pytest.mark.parametrize("module", [losses, star, ccsi, ccsi_seg, inversion], ids=lambda m: m.__name__)
def test_every_loss_is_in_the_table(module: ModuleType) -> None:
    own = {
        name
        for name, part in vars(module).items()
        if inspect.isfunction(part) and part.__module__ == module.__name__ and not name.startswith("_")
    }
    assert own
    assert own <= {name.partition(",")[0] for name in CASES} | NO_LOSS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_its_slope_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    loss, given = CASES[name]
    halves = [tensor.to(dtype).requires_grad_() for tensor in given]
    wholes = [tensor.detach().float().requires_grad_() for tensor in halves]
    with torch.autocast("cpu", dtype):
        found = loss(*halves)
        mixed = loss(*wholes)
    plain = loss(*wholes)
    for result in (found, mixed):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, plain, rtol=2e-6, atol=1e-7)
    slopes = [torch.autograd.grad(part.sum(), at, allow_unused=True) for part, at in [(found, halves), (plain, wholes)]]
    for half, whole in zip(*slopes, strict=True):
        assert (half is None) == (whole is None)
        if half is not None and whole is not None:
            assert half.dtype == dtype
            torch.testing.assert_close(half.float(), whole.to(dtype).float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_pseudo_labels_of_half_logits_are_those_of_float32(dtype: torch.dtype) -> None:
    logits = torch.linspace(-8, 8, 20_000).view(1, 1, 100, 200).to(dtype)
    with torch.autocast("cpu", dtype):
        found = ccsi_seg.pseudo_labels(logits, (7,), 0.9)
    assert torch.equal(found, ccsi_seg.pseudo_labels(logits.double().float(), (7,), 0.9))


# Batches of the papers: 24 crops of 512 x 512, seen here through one pixel that stands for all ------------------------

PUBLISHED = (24, 512, 512)
ONE, EVERYWHERE = torch.ones(()), torch.ones((), dtype=torch.bool).expand(PUBLISHED)
LOG_ABSENT, SIGMA = math.log1p(math.exp(3)), 1 / (1 + math.exp(-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda z: negative_bce(z), LOG_ABSENT),
        (lambda z: negative_bce(z, EVERYWHERE), LOG_ABSENT),
        (lambda z: class_bce(z[..., :32, :32], EVERYWHERE.long() * 0, (1,), 4.0), LOG_ABSENT),
        (lambda z: class_bce(z[..., :32, :32], EVERYWHERE.long(), (1,), 4.0, False), -4 * math.log(SIGMA)),
        (lambda z: star.ocfm(z, 0 * z, ONE.expand(PUBLISHED)), 9.0),
        # each image: mean over its positive pixels; there are no negative ones
        (lambda z: ccsi_seg.balanced_bce(z, ONE.expand(z.shape), EVERYWHERE), -math.log(SIGMA)),
        (lambda z: ccsi_seg.dice_loss(z, ONE.expand(z.shape), EVERYWHERE), 1 - 2 * SIGMA / (SIGMA + 1)),
        (lambda z: ccsi_seg.pixel_margin(z.expand(-1, 2, -1, -1), EVERYWHERE.long(), (1,), 1.0), 1.0),
    ],
    ids=["negatives", "masked negatives", "current", "current, masked", "ocfm", "balanced", "dice", "pixel margin"],
)  # fmt: skip
def test_a_published_batch_neither_overflows_nor_loses_digits(
    loss: Callable[[Tensor], Tensor], expected: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor(3.0, dtype=dtype).expand(PUBLISHED[0], 1, *PUBLISHED[1:])
    with torch.autocast("cpu", dtype):
        found = loss(logits)
    assert found.sum().item() == pytest.approx(expected, rel=1e-5)


# Synthesis: its loss runs outside of autocast, whatever surrounds it --------------------------------------------------


def test_synthesis_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    network = cosine_resnet(3)
    network.grow(3)
    network.train()
    network(values(40, 3, 32, 32).abs())
    network.eval()
    options = SynthesisOptions(steps=3, warmup=0, group_size=6, jitter=0, tv1=0.1, statistics="class", precision="fp32")
    means, moments = values(3, 3, 32, 32).abs().clamp(0, 1), values(3, 36, 4, seed=1).abs()
    request = Request(plan_groups(2, 3, options, 0), range(2), 0, means, moments)
    assert set(Objective(network, options, moments).terms(values(12, 3, 32, 32), request.targets)) == {
        "ce", "tv2", "tv1", "l2", "moments", "statistics",
    }  # fmt: skip
    plain = synthesise(network, request, options)
    with torch.autocast("cpu", torch.bfloat16):
        found = synthesise(network, request, options)
    assert torch.equal(found.images, plain.images)
    assert all(torch.equal(found.losses[name], plain.losses[name]) for name in plain.losses)
