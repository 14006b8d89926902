"""OCFM, SAD, the replay term and the balance of STAR."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.methods.losses import channels_of
from perdure.methods.star.statistics import core_pixels
from perdure.methods.star.terms import balance, ocfm, replay_bce, sad


@pytest.mark.golden
def test_ocfm_golden(wave, lab):
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = core_pixels((lab == 0) & ((y // 8 + x // 8) % 2 == 0), 16).float().mean(0)
    assert float(mask.sum()) == 8.25
    loss = ocfm(wave((2, 256, 4, 4), 0.013, 0.3).relu(), wave((2, 256, 4, 4), 0.017, 0.5).relu(), mask)
    assert float(loss) == pytest.approx(0.2892473, rel=1e-5)


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 2)])
def test_ocfm_of_an_empty_mask_is_zero(size):
    features = torch.randn(2, 8, *size, requires_grad=True)
    loss = ocfm(features, torch.randn(2, 8, *size), torch.zeros(2, *size))
    loss.backward()
    assert loss.item() == 0.0 and not features.grad.any()


def plain_sad(features, labels, new, prototypes, stride):
    """The definition, class by class, on the resized full-resolution masks."""
    mode = "bilinear" if features.dim() == 4 else "trilinear"
    unit = features / features.norm(dim=1, keepdim=True)
    pushes = []
    for c in new:
        mask = F.interpolate((labels == c)[:, None].float(), features.shape[2:], mode=mode, align_corners=False)
        centre = (mask * unit).sum((0, *range(2, features.dim())))
        centre = centre / centre.norm().clamp_min(1e-12)
        pushes.append(1 / min((centre - p).norm() for p in prototypes))
    return torch.stack(pushes)


@pytest.mark.parametrize(("size", "stride"), [((4, 4), 16), ((4, 4, 4), 4)])
def test_sad_equals_the_definition(lab, size, stride):
    torch.manual_seed(0)
    labels = lab if len(size) == 2 else lab[:, :16, :16, None].repeat(1, 1, 1, 16)
    new = (3, 4) if len(size) == 2 else (3,)
    ours = torch.randn(2, 32, *size).relu().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    prototypes = F.normalize(torch.randn(6, 32), dim=1)
    loss = sad(ours, channels_of(core_pixels(labels, stride), new), len(new), prototypes)
    expected = plain_sad(theirs, labels, new, prototypes, stride).mean()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_absent_classes_count_only_in_compat(lab):
    torch.manual_seed(0)
    features, prototypes = torch.randn(2, 32, 4, 4).relu(), F.normalize(torch.randn(6, 32), dim=1)
    channels = channels_of(core_pixels(lab, 16), (3, 4, 5))
    present = plain_sad(features, lab, (3, 4), prototypes, 16)
    torch.testing.assert_close(sad(features, channels, 3, prototypes), present.mean())
    torch.testing.assert_close(sad(features, channels, 3, prototypes, absent=True), (present.sum() + 1) / 3)


def test_sad_of_nothing_is_zero_and_of_a_hit_is_finite():
    features = torch.ones(1, 4, 2, 2, requires_grad=True)
    prototypes = F.normalize(torch.ones(1, 4), dim=1)
    nothing = torch.full((4, 1, 2, 2), -1)
    assert sad(features, nothing, 2, prototypes).item() == 0.0
    hit = sad(features, torch.zeros_like(nothing), 1, prototypes)
    hit.backward()
    assert hit.item() == pytest.approx(1e6, rel=0.1) and torch.isfinite(features.grad).all()


def test_classes_without_statistics_push_nobody():
    torch.manual_seed(0)
    features, channels = torch.randn(1, 4, 2, 2), torch.zeros(4, 1, 2, 2, dtype=torch.int64)
    prototypes = F.normalize(-torch.ones(1, 4), dim=1)
    empty = torch.zeros(1, 4)
    assert torch.equal(
        sad(features, channels, 1, torch.cat([prototypes, empty])), sad(features, channels, 1, prototypes)
    )
    only = sad(features.requires_grad_(), channels, 1, empty)
    only.backward()
    assert only.item() == 0.0 and torch.isfinite(features.grad).all()


@pytest.mark.parametrize("size", [1, 7, 100])
def test_replay_term_in_chunks_equals_the_whole(size):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 8), torch.randn(3, 8), torch.randn(3)
    ours, theirs = ([t.clone().requires_grad_() for t in (weight, bias)] for _ in range(2))
    loss = replay_bce(iter(x.split(size)), *ours)
    logits = F.linear(x, *theirs)
    expected = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none").mean(0)
    for value in (loss, expected):
        (value * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_replay_of_nothing_is_zero():
    weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(3, requires_grad=True)
    loss = replay_bce([], weight, bias)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 3 and not weight.grad.any() and not bias.grad.any()


def test_balance():
    current, replayed, background = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.1]), torch.tensor([0.3, 0.4])
    parts = balance(current, replayed, background, torch.tensor(4.0), torch.tensor(5.0))
    expected = sum((c + 4 * r + 5 * b) / 10 for c, r, b in zip(current, replayed, background, strict=True))
    torch.testing.assert_close(torch.stack(parts).sum(), expected)
    alone = balance(current, replayed, background, torch.tensor(0.0), torch.tensor(0.0))
    assert [float(part) for part in alone] == [3.0, 0.0, 0.0]
