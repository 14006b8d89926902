"""Synthesis of class impressions: terms by hand, schedule, groups, resume, profiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.errors import PerdureError, UsageError
from perdure.methods.ccsi.impressions import (
    IMAGENET_RANGE,
    Objective,
    Request,
    inversion_batches,
    plan_groups,
    start_images,
    synthesise,
)
from perdure.methods.ccsi.options import FAITHFUL_SYNTHESIS, SynthesisOptions
from perdure.methods.inversion.engine import InversionBatch, JitterFlip
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import ContinualNorm

SHORT = {"steps": 12, "warmup": 3, "group_size": 4, "statistics": "none", "precision": "fp32"}


def options(**changed: Any) -> SynthesisOptions:
    return SynthesisOptions(**{**SHORT, **changed})


def tiny(norm: Callable[[int], nn.Module] = ContinualNorm, classes: int = 3) -> Classifier:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 8, 3, 2, 1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), norm(8), nn.ReLU(inplace=True),
        nn.AvgPool2d(2), nn.Flatten(),
    )  # fmt: skip
    network = Classifier(body, 32, in_channels=2)
    network.grow(classes)
    nn.init.constant_(network.head.scale, 5.0)
    network.train()
    for _ in range(3):
        network(torch.rand(4, 2, 8, 8))
    return network.eval()


def job(settings: SynthesisOptions, groups: int = 3, classes: int = 3, seed: int = 7) -> Request:
    means = torch.rand(classes, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return Request(plan_groups(groups, classes, settings, seed), range(groups), seed, means)


def part(whole: Request, row: int) -> Request:
    return Request(whole.targets[row : row + 1], [whole.numbers[row]], whole.seed, whole.means, whole.moments)


def only_batch(teacher: Classifier, whole: Request, settings: SynthesisOptions) -> InversionBatch:
    """All groups in one tensor."""
    (batch,) = inversion_batches(Objective(teacher, settings), whole, settings, torch.device("cpu"))
    return batch


# Terms ------------------------------------------------------------------------------------------------------------


def two_pixels(norm: nn.Module) -> Classifier:
    """Feature = the normalised channel values of a 1x2 image of one channel; class rows (1, 0) and (0, 1)."""
    network = Classifier(nn.Sequential(norm, nn.Flatten()), 2)
    network.grow(2)
    with torch.no_grad():
        network.head.rows[0].copy_(torch.eye(2))
        network.head.scale.fill_(2.0)
    return network.eval()


def test_terms_worked_by_hand():
    norm = nn.BatchNorm2d(1, eps=0.0)  # running mean 0 and variance 1: evaluation passes x on
    images = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    # TV needs two rows, so it is off here (test_ccsi_priors works it out); L2: (5 + 1) / 2 = 3, times 0.1.
    # Cosines: (0.6, 0.8) and (0, 1), times 2; targets 0 and 1.
    # CE: image 0: ln(e^1.2 + e^1.6) - 1.2 = ln(1 + e^0.4); image 1: ln(e^0 + e^2) - 2 = ln(1 + e^-2).
    # Moments: mean (3 + 4 + 0 + 1) / 4 = 2, mean square 26 / 4 = 6.5, variance 2.5. Apart |2 - 0| + |2.5 - 1| = 3.5,
    # and the only layer is the first: times 10.
    found = Objective(two_pixels(norm), options(tv2=0)).terms(images, torch.tensor([[0, 1]]))
    assert set(found) == {"ce", "l2", "moments"}
    assert found["ce"].item() == pytest.approx((math.log(1 + math.exp(0.4)) + math.log(1 + math.exp(-2))) / 2)
    assert found["l2"].item() == pytest.approx(0.3)
    assert found["moments"].item() == pytest.approx(35.0)


def test_weights_scale_their_terms():
    teacher, images, targets = tiny(), torch.rand(8, 2, 8, 8), torch.zeros(2, 4, dtype=torch.int64)
    one = Objective(teacher, options(tv1=1, tv2=1, l2=1, first_layer=1)).terms(images, targets)
    two = Objective(teacher, options(kappa=2, tv1=3, tv2=4, l2=5, moments=6, first_layer=1)).terms(images, targets)
    for name, factor in (("ce", 2), ("tv1", 3), ("tv2", 4), ("l2", 5), ("moments", 6)):
        assert torch.allclose(two[name], factor * one[name])
        assert one[name].shape == (2,)


def test_first_layer_counts_more():
    teacher, images, targets = tiny(), torch.rand(4, 2, 8, 8), torch.zeros(1, 4, dtype=torch.int64)
    by_weight = {r: Objective(teacher, options(first_layer=r)).terms(images, targets)["moments"] for r in (0, 1, 10)}
    first = by_weight[1] - by_weight[0]
    assert first.item() > 0
    assert torch.allclose(by_weight[10], by_weight[0] + 10 * first)


def test_class_statistics_worked_by_hand():
    # A ContinualNorm of one group sees each image itself: (3, 5) has mean 4 and variance 1, (0, 2) mean 1 and
    # variance 1, (6, 6) mean 6 and variance 0. Class 0 shows images 0 and 1: mean 2.5, variance 1. Class 1: 6 and 0.
    # Kept: class 0 mean 2 and variance 3: apart 0.5 + 2 = 2.5. Class 1 mean 5 and variance 0: apart 1.
    # The mean over the two classes shown is 1.75; class 2 is not shown.
    teacher = two_pixels(ContinualNorm(1, groups=1, eps=1e-5))
    kept = torch.tensor([[[2.0, 3.0]], [[5.0, 0.0]], [[100.0, 100.0]]])
    images = torch.tensor([[3.0, 5], [0, 2], [6, 6]]).view(3, 1, 1, 2).requires_grad_()
    objective = Objective(teacher, options(tv2=0, statistics="class"), kept)
    found = objective.terms(images, torch.tensor([[0, 0, 1]]))["statistics"]
    assert found.item() == pytest.approx(1.75, abs=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient[2].flatten().tolist() == pytest.approx([0.25, 0.25], abs=1e-4)  # of the mean, half of one half


def with_positions() -> Classifier:
    teacher = tiny(lambda channels: ContinualNorm(channels, group_statistics=True))
    assert teacher.body[1].group_mean is not None
    return teacher


def test_position_statistics_add_a_value_without_gradient():
    teacher, images = with_positions(), torch.rand(4, 2, 8, 8)
    targets = torch.zeros(1, 4, dtype=torch.int64)
    settings = options(statistics="position", first_layer=10)
    found = Objective(teacher, settings).terms(images, targets)["statistics"]
    expected, x = 0.0, images
    for layer, weight in zip(teacher.body[:6], (0, 10, 0, 0, 1, 0), strict=True):
        if weight:
            mean, var = layer.group_moments(x)
            expected += weight * ((mean - layer.group_mean).norm() + (var - layer.group_var).norm())
        x = layer(x)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    images.requires_grad_()
    loss, plain_loss = (
        torch.stack(list(Objective(teacher, each).terms(images, targets).values())).sum()
        for each in (settings, options())
    )
    ((gradient,), (plain,)) = (torch.autograd.grad(value, images) for value in (loss, plain_loss))
    assert loss > plain_loss
    assert torch.equal(gradient, plain)


def test_statistics_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="no Continual Normalization"):
        Objective(tiny(nn.BatchNorm2d), options(statistics="class"), torch.zeros(3, 4, 2))
    with pytest.raises(UsageError, match="no moments"):
        Objective(tiny(), options(statistics="class"))
    with pytest.raises(UsageError, match="training batches of 4"):
        Objective(tiny(), options(statistics="position"))
    with pytest.raises(UsageError, match="training batches of 5"):
        Objective(with_positions(), options(statistics="position", group_size=5))


# Schedule, plan, start --------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_published_learning_rate():
    faithful = SynthesisOptions(**FAITHFUL_SYNTHESIS)
    rates = {0: 5e-4, 49: 0.025, 99: 0.05, 100: 0.02, 2550: 0.01}
    assert {step: faithful.rate(step) for step in rates} == pytest.approx(rates, rel=1e-6)
    assert faithful.rate(4999) == pytest.approx(2e-9, rel=0.05)
    clean = SynthesisOptions()
    assert clean.rate(clean.warmup - 1) == clean.rate(clean.warmup) == clean.lr  # no jump after the warm-up


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="warmup"):
        SynthesisOptions(steps=50, warmup=50)
    with pytest.raises(ValueError, match="betas"):
        SynthesisOptions(betas=(0.5, 1.0))


def test_balanced_plan_counts_right_where_classes_do_not_divide_the_group():
    plan = plan_groups(5, 3, SynthesisOptions(), seed=0)
    assert plan.shape == (5, 40)
    assert torch.bincount(plan.flatten()).tolist() == [67, 67, 66]
    assert all(torch.bincount(row, minlength=3).max() == 14 for row in plan)


def test_random_plan_depends_on_the_number_of_the_group_alone():
    settings = options(targets="random", group_size=400)
    plan = plan_groups(4, 3, settings, seed=5)
    assert torch.equal(plan[:2], plan_groups(2, 3, settings, seed=5))
    assert not torch.equal(plan[0], plan[1])
    assert not torch.equal(plan, plan_groups(4, 3, settings, seed=6))
    assert torch.bincount(plan.flatten(), minlength=3).min() > 450  # of 1600 / 3 = 533


def test_start_is_the_mean_with_noise_or_noise_alone():
    settings = options(group_size=2)
    whole = job(settings, groups=2)
    assert torch.equal(start_images(whole, options(group_size=2, noise=0)), whole.means[whole.targets.flatten()])
    noise = start_images(whole, options(group_size=2, start="noise"))
    mixed = start_images(whole, settings)
    assert torch.allclose(mixed, whole.means[whole.targets.flatten()] + 0.1 * noise)
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(noise[2:], start_images(part(whole, 1), options(group_size=2, start="noise")))


# Jitter and flips -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0, 2, 30])
def test_moves_are_shifts_and_mirrors_and_can_be_undone(jitter):
    settings = options(jitter=jitter, flip=True, steps=40)
    images = torch.rand(3, 4, 2, 5, 6, requires_grad=True)
    moves = JitterFlip([4, 9, 2], settings.steps, jitter, True, 11)
    for step in range(settings.steps):
        moved = moves(images, step)
        # the gradient of a pixel arrives where the pixel came from
        assert torch.equal(torch.autograd.grad(moved, images, moved.detach())[0], images)
        for row, number in enumerate([4, 9, 2]):
            down, right, flip = moves.table[row, step].tolist()
            assert abs(down) <= jitter
            expected = images[row].roll((down, right), (2, 3))
            assert torch.equal(moved[row], expected.flip(3) if flip else expected)
            single = JitterFlip([number], settings.steps, jitter, True, 11)
            assert torch.equal(single(images[row : row + 1], step)[0], moved[row])
    assert 20 < moves.table[..., 2].sum() < 100


# The loop ---------------------------------------------------------------------------------------------------------


def published_loop(teacher: Classifier, whole: Request, settings: SynthesisOptions) -> Tensor:
    """One group, written down plainly: torch's Adam, moves in the graph, moments by hooks."""
    objective = Objective(teacher, settings, whole.moments)
    images = start_images(whole, settings).requires_grad_()
    adam = torch.optim.Adam([images], lr=1.0, betas=settings.betas)
    moves = JitterFlip(whole.numbers, settings.steps, settings.jitter, settings.flip, whole.seed)
    for step in range(settings.steps):
        adam.param_groups[0]["lr"] = settings.rate(step)
        adam.zero_grad()
        torch.stack(list(objective.terms(moves(images[None], step)[0], whole.targets).values())).sum().backward()
        adam.step()
        images.data.clamp_(0, 1)
    return images.detach()


def test_loop_is_adam_on_moved_images():
    teacher, settings = tiny(), options(flip=True)
    whole = job(settings, groups=1)
    assert torch.allclose(
        synthesise(teacher, whole, settings).images, published_loop(teacher, whole, settings), atol=1e-4
    )


def test_groups_come_out_as_if_alone():
    teacher, settings = tiny(), options(flip=True)
    whole = job(settings)
    together = synthesise(teacher, whole, settings)
    assert together.images.shape == (12, 2, 8, 8)
    assert together.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    for row in range(3):
        alone = synthesise(teacher, part(whole, row), settings)
        assert torch.allclose(together.images[4 * row : 4 * row + 4], alone.images, atol=1e-5)
        assert all(torch.allclose(together.losses[name][row], value[0]) for name, value in alone.losses.items())


@pytest.mark.parametrize("keep", ["last", "best"])
def test_groups_in_one_tensor_come_out_as_if_alone(keep, monkeypatch):
    """What a GPU does with all groups at once."""
    teacher, settings = tiny(), options(flip=True, keep=keep, settle_window=2, settle_tolerance=0.05)
    whole = job(settings)
    batch = only_batch(teacher, whole, settings)
    assert batch.images.shape == (3, 4, 2, 8, 8)
    batch.advance(0, 5)
    batch.advance(5, settings.steps)
    monkeypatch.setattr("perdure.methods.ccsi.impressions.CPU_PIXELS", 1)  # each group by itself
    expected = synthesise(teacher, whole, settings)
    assert batch.done
    assert len(set(batch.steps.tolist())) > 1
    assert torch.equal(batch.steps, expected.steps)
    assert torch.allclose(batch.kept.flatten(0, 1), expected.images, atol=1e-4)


def test_groups_that_exceed_one_tensor_are_cut(monkeypatch):
    teacher, settings = tiny(), options()
    together = synthesise(teacher, job(settings), settings)
    monkeypatch.setattr("perdure.methods.ccsi.impressions.CPU_PIXELS", 2 * 4 * 8 * 8)  # two groups, then one
    cut = synthesise(teacher, job(settings), settings)
    assert torch.allclose(cut.images, together.images, atol=1e-5)
    assert cut.labels.equal(together.labels)


def test_bf16_ends_at_the_same_loss():
    teacher = tiny()
    found = [
        synthesise(teacher, job(settings), settings).losses
        for settings in (options(steps=60, precision=precision) for precision in ("fp32", "bf16"))
    ]
    exact, rough = (torch.stack(list(losses.values())).sum(0) for losses in found)
    assert torch.allclose(exact, rough, rtol=0.05)
    assert not torch.equal(exact, rough)


class Stop(Exception):
    """Raised by the progress below."""


class Progress:
    """Remembers ticks, saves copies, and stops after a number of them."""

    def __init__(self, saved: Mapping[str, Any] | None = None, stop: int = 10**9) -> None:
        self.saved, self.stop = saved, stop
        self.ticks: list[tuple[int, int, str]] = []

    def checkpoint(self, done: int, of: int, note: str, state: Callable[[], dict[str, object]]) -> None:
        self.ticks.append((done, of, note))
        if len(self.ticks) == self.stop:
            self.saved = copy.deepcopy(state())
            raise Stop


@pytest.mark.parametrize("changed", [{}, {"keep": "best"}, {"settle_window": 10, "settle_tolerance": 0.4}])
def test_a_stopped_synthesis_goes_on_to_the_same_bits(changed):
    teacher, settings = tiny(), options(steps=70, flip=True, **changed)
    whole = job(settings)
    straight = synthesise(teacher, whole, settings)
    progress = Progress(stop=2)
    with pytest.raises(Stop):
        synthesise(teacher, whole, settings, progress)
    torch.manual_seed(99)
    resumed = Progress(progress.saved)
    again = synthesise(teacher, whole, settings, resumed)
    assert torch.equal(again.images, straight.images)
    assert all(torch.equal(again.losses[name], value) for name, value in straight.losses.items())
    assert torch.equal(again.steps, straight.steps)
    if not changed:
        assert [tick[:2] for tick in progress.ticks + resumed.ticks] == [(20, 70), (40, 70), (60, 70)]
    else:
        assert resumed.ticks or changed


def test_loss_falls_and_teacher_gets_no_gradients():
    teacher, settings = tiny(), options(steps=60, warmup=5, jitter=1)
    before = copy.deepcopy(teacher.state_dict())
    whole = job(settings)
    made = synthesise(teacher, whole, settings)
    start = Objective(teacher, settings).terms(start_images(whole, settings), whole.targets)
    assert all(made.losses[name].sum() < start[name].sum() for name in ("ce", "moments"))
    assert made.images.dtype == torch.float32
    assert not made.images.requires_grad
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    assert made.steps.tolist() == [60] * 3
    assert all(value.grad is None and value.requires_grad for value in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_early_stop_stops():
    settings = options(steps=2000, settle_window=10, settle_tolerance=0.1)
    made = synthesise(tiny(), job(settings), settings)
    assert made.steps.max() < 200
    assert ((made.steps - settings.warmup) % 10 == 0).all()
    assert made.steps.min() >= settings.warmup + 20  # two windows to compare


def test_kept_image_is_the_best_under_the_noisy_criterion():
    # A learning rate far too large: the loss is lowest at the first step, and the image after it is kept.
    settings = options(steps=10, warmup=0, lr=2.0, keep="best", noise=0.0)
    whole = job(settings, groups=1)
    batch = only_batch(tiny(), whole, settings)
    seen = []
    for step in range(settings.steps - 1):
        batch.advance(step, step + 1)
        seen.append((batch.latest.item(), batch.images.detach().clone()))
    least = min(seen, key=lambda pair: pair[0])
    assert batch.least.item() == pytest.approx(least[0])
    assert torch.equal(batch.kept, least[1])


def test_published_clip_bounds_the_first_channel_only():
    settings = options(clamp="channel0", lr=3.0, warmup=0, tv2=0, l2=0)
    images = synthesise(tiny(), job(settings), settings).images
    low, high = IMAGENET_RANGE
    assert (low, high) == pytest.approx((-2.1179, 2.2489), abs=1e-4)
    assert images[:, 0].min() >= low
    assert images[:, 0].max() <= high
    assert images[:, 1].abs().max() > 3


def test_faithful_profile_runs():
    settings = SynthesisOptions(**{**FAITHFUL_SYNTHESIS, "steps": 4, "warmup": 1, "group_size": 4})
    made = synthesise(with_positions(), job(settings), settings)
    assert set(made.losses) == {"ce", "tv2", "l2", "moments", "statistics"}
    assert torch.isfinite(made.images).all()


def test_numbers_that_are_not_finite_are_refused():
    settings = options()
    broken = tiny()
    with torch.no_grad():
        broken.body[0].weight[0] = torch.nan
    with pytest.raises(PerdureError, match="the old network is broken"):
        synthesise(broken, job(settings), settings)
    whole = job(settings)
    whole.means[1, 0, 0, 0] = torch.inf
    with pytest.raises(PerdureError, match="mean image"):
        synthesise(tiny(), whole, settings)
    wild = options(lr=1e30, clamp="channel0")
    with pytest.raises(PerdureError, match="loss of the synthesis"):
        synthesise(tiny(), job(wild), wild)
    with pytest.raises(PerdureError, match="kept moments"):
        Objective(tiny(), options(statistics="class"), torch.full((3, 8, 2), torch.nan))
