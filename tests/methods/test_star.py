"""The method STAR, task after task, on a tiny network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from perdure.data.case import Batch
from perdure.engine.phases import Train
from perdure.engine.state import restore
from perdure.labels import IGNORE
from perdure.methods.star import Star
from perdure.methods.star.replay import RULES, Counts
from perdure.methods.star.star import KEPT_BUFFERS
from perdure.methods.star.statistics import core_pixels, grid_pixels
from perdure.networks.segmenter import upsample

GROUPS = [(2, 5), (1,), (4, 3)]


def star(make_setup, dims=2, training=None, width=8, **options):
    return Star(make_setup(Star.Options(**options), dims=dims, width=width, **(training or {})))


def batches_of(stream, index, method, first_batch):
    task = stream.tasks[index]
    with stream.opened(task):
        return first_batch(method.phases(task)[0].data())


@pytest.fixture
def at_second(make_blocks, make_setup, learn, first_batch):
    """A STAR in the middle of its second task, and a batch of it."""

    def make(dims=2, groups=GROUPS, training=None, **options):
        stream = make_blocks(groups, dims)
        method = star(make_setup, dims, training, **options)
        learn(method, stream, 0)
        learn(method, stream, 1, phases=1)
        with torch.no_grad():  # as if some steps were done: the features have moved
            for parameter in method.network.body.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return method.train(), batches_of(stream, 1, method, first_batch)

    return make


@pytest.mark.contract
@pytest.mark.parametrize("dims", [2, 3])
def test_three_tasks(make_blocks, make_setup, learn, dims):
    stream, method = make_blocks(GROUPS, dims, count=4), star(make_setup, dims)
    for index, new in enumerate(GROUPS):
        before = {name: getattr(method, name).clone() for name in KEPT_BUFFERS}
        log = learn(method, stream, index)
        assert list(log) == ["counts", "train", "prototypes", "spreads"]
        assert all(math.isfinite(value) for terms in log["train"] for value in terms.values())
        assert set(log["train"][0]) == ({"current", "replay", "background", "ocfm", "sad"} if index else {"current"})
        seen = sum(len(group) for group in GROUPS[: index + 1])
        rows = {name: getattr(method, name) for name in KEPT_BUFFERS}
        assert [tuple(r.shape) for r in rows.values()] == [(seen, 8), (seen, 8), (seen, 2), (seen,), ()]
        for name in KEPT_BUFFERS[:4]:  # appended in learning order; old rows stay
            assert torch.equal(rows[name][: seen - len(new)], before[name])
        assert torch.isfinite(torch.cat([r.flatten() for r in rows.values()])).all()
        assert method.replay_amounts is None and method.repeat_factor is None
    assert log["train"][0]["replay"] > 0
    images = torch.randn(1, 3, *[16] * dims)
    with torch.no_grad():
        predicted = method.eval().predict(images)
        logits = upsample(method.network(images)[0], images.shape[2:])
    assert predicted.class_ids == (0, 2, 5, 1, 4, 3)
    best, channel = logits.max(1)
    expected = torch.where(best > 0, torch.tensor([2, 5, 1, 4, 3])[channel], 0)
    assert torch.equal(predicted.labels(), expected)
    assert expected.unique().numel() > 1


def test_bytes_a_class(make_setup, make_blocks, learn):
    method = star(make_setup, width=256, training={"epochs": 1})
    learn(method, make_blocks([(2, 5), (1,)]), 0)
    (kept,) = method.kept()
    state = method.state_dict()
    assert kept.per_class and kept.kind == "statistics" and set(kept.keys) == set(KEPT_BUFFERS)
    assert sum(state[key].nbytes for key in kept.keys) == 2 * 2060 + 4
    assert {k for k in state if not k.startswith("network.")} == set(KEPT_BUFFERS)


def test_statistics_of_the_first_task(make_blocks, make_setup, learn, first_batch):
    stream, method = make_blocks(GROUPS, count=2), star(make_setup)
    learn(method, stream, 0)
    batch = batches_of(stream, 0, method, first_batch)
    labels = grid_pixels(batch.labels, 4)
    assert method.background_count == (labels == 0).sum()
    with torch.no_grad():
        features = method.eval().network.features(batch.images).movedim(1, -1).double()
    for row, c in enumerate(GROUPS[0]):
        vectors = features[labels == c]
        norm = vectors.norm(dim=1, keepdim=True)
        prototype = nn.functional.normalize((vectors / norm).sum(0), dim=0)
        spread = ((vectors / norm) - prototype).square().mean(0).sqrt()
        assert method.counts[row] == len(vectors) > 1
        torch.testing.assert_close(method.prototypes[row], prototype.float())
        torch.testing.assert_close(method.spreads[row], spread.float())
        torch.testing.assert_close(method.norms[row], torch.stack([norm.mean(), norm.std()]).float())


@pytest.mark.parametrize(
    ("chosen", "recurs", "used"), [("auto", True, "overlap"), ("auto", False, "disjoint"), ("carried", True, "carried")]
)
def test_bookkeeping_of_a_later_task(make_blocks, make_setup, learn, first_batch, chosen, recurs, used):
    stream = make_blocks(GROUPS, recurs=recurs)
    method = star(make_setup, bookkeeping=chosen, training={"batch_size": 3})
    learn(method, stream, 0)
    n_c, n_0 = method.counts.double(), method.background_count.double()
    learn(method, stream, 1, phases=1)
    with torch.no_grad():
        old = method.old_network.module
        view = stream.tasks[1]
        with stream.opened(view):
            data = method.phases(view)[0].data()
            samples = [data.samples[i] for i in range(6)]
        logits = upsample(old(torch.stack([s.image for s in samples]))[0], (16, 16))
        labels = grid_pixels(torch.stack([s.label for s in samples]), 4)
    best, channel = (v[:, 2::4, 2::4] for v in logits.max(1))
    q = torch.where(best > 0.5, channel + 1, 0)[labels == 0]
    m = torch.bincount(q, minlength=3).double()
    books = RULES[used](Counts(n_c, n_0, m), 1, 2)
    torch.testing.assert_close(method.replay_amounts, books.replays.float())
    torch.testing.assert_close(method.repeat_factor, books.repeat.float())
    torch.testing.assert_close(method.background_count, books.background.float())
    torch.testing.assert_close(method.counts, torch.cat([books.old, (labels == 1).sum()[None].double()]).float())


def test_amounts_do_not_depend_on_who_counts(at_second):
    method, batch = at_second()
    method.eval()
    with torch.no_grad():
        whole = method._count(batch)
        halves = [method._count(Batch(batch.images[i : i + 1], batch.labels[i : i + 1], ("",))) for i in range(2)]
    for name, value in whole.items():
        assert torch.equal(halves[0][name] + halves[1][name], value)


def test_old_classifiers_get_no_gradient_and_stay(make_blocks, make_setup, learn):
    stream, method = make_blocks(GROUPS), star(make_setup)
    learn(method, stream, 0)
    before = copy.deepcopy(method.network.state_dict())
    learn(method, stream, 1)
    assert all(p.grad is None for p in method.network.classifiers[0].parameters())
    after = method.network.state_dict()
    same = {k for k, v in before.items() if torch.equal(after[k], v)}
    assert {"classifiers.0.weight", "classifiers.0.bias"} <= same
    assert {k for k in before if k.startswith("body.1.")} <= same  # normalisation: statistics and affine
    assert "body.0.weight" not in same


def test_compat_old_classifiers_decay(make_blocks, make_setup, learn):
    stream = make_blocks(GROUPS)
    training = {"weight_decay": 0.1, "schedule": "constant", "epochs": 1}
    method = star(make_setup, compat=("old_classifier_decay",), training=training)
    learn(method, stream, 0)
    before = method.network.classifiers[0].weight.detach().clone()
    learn(method, stream, 1)
    weight = method.network.classifiers[0].weight.detach()
    shrink = weight / before
    assert not method.network.classifiers[0].weight.grad.any()
    assert shrink.max() < 1 and shrink.std() < 1e-6


def test_old_network_is_frozen_and_not_saved(at_second):
    method, batch = at_second()
    old = method.old_network.module
    assert not any("old" in name for name in method.state_dict())
    assert not any(p.requires_grad for p in old.parameters()) and not old.training
    loss = method.later_loss(batch)
    torch.stack(list(loss.values())).sum().backward()
    assert all(p.grad is None for p in old.parameters())
    method.double()
    assert next(old.parameters()).dtype == torch.float64


@pytest.mark.parametrize("dims", [2, 3])
def test_loss_of_a_later_task_equals_the_definition(at_second, dims):
    """Everything at full resolution and class by class, as the specification writes it."""
    method, batch = at_second(dims, [(2, 4), (1, 3)], compat=("trunc", "sad_constant"))
    method.spreads.zero_()
    method.norms[:, 1] = 0  # replayed features are then the scaled prototypes
    terms = method.later_loss(batch)
    old, labels, size = method.old_network.module, batch.labels, batch.labels.shape[1:]
    features = method.network.features(batch.images)
    classifier = method.network.classifiers[-1]
    logits = classifier(features)
    old_features = old.features(batch.images)
    best, channel = upsample(old.classify(old_features), size).max(1)
    q = torch.where(best > 0.5, channel + 1, 0)
    bce = nn.functional.binary_cross_entropy_with_logits
    spatial = "bilinear" if dims == 2 else "trilinear"

    def resize(mask):
        return nn.functional.interpolate(mask[:, None].float(), features.shape[2:], mode=spatial)[:, 0]

    s = features[:, 0].numel()
    numbers = method.replay_amounts.long()
    w_rep = numbers.sum() / s
    region = (grid_pixels(labels, 4) == 0) & (grid_pixels(q, 4) == 0)
    w_bg = method.repeat_factor * region.sum() / s
    replayed = (method.prototypes * method.norms[:, :1]).repeat_interleave(numbers, 0)
    replay_logits = classifier(replayed.t().reshape(1, 8, -1, *[1] * (dims - 1)))
    full = upsample(logits, size)
    sums = torch.zeros(3)
    push = 0.0
    for k, c in enumerate((1, 3)):
        target = (labels == c).float()
        sums[0] += bce(full[:, k], target, pos_weight=torch.tensor(4.0)).detach()
        sums[1] += bce(replay_logits[:, k], torch.zeros_like(replay_logits[:, k])).detach()
        sums[2] += bce(logits[:, k][region], torch.zeros(int(region.sum()))).detach()
        unit = nn.functional.normalize(features, dim=1)
        centre = nn.functional.normalize((resize(labels == c)[:, None] * unit).sum((0, *range(2, 2 + dims))), dim=0)
        push += 1 / (centre - method.prototypes).norm(dim=1).min() / 2
    mask = resize((labels == 0) & (q > 0))
    change = (mask * (features - old_features).square().sum(1)).sum() / (8 * mask.sum())
    total = 1 + w_rep + w_bg
    assert numbers.sum() > 0 and region.any() and mask.any() and method.repeat_factor > 0
    expected = {
        "current": sums[0] / total,
        "replay": w_rep * sums[1] / total,
        "background": w_bg * sums[2] / total,
        "ocfm": 5 * change,
        "sad": 0.05 * push,
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].detach(), value.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dims", [2, 3])
def test_rivals_push_old_logits_down_where_new_classes_are(at_second, dims):
    method, batch = at_second(dims, [(2, 4), (1, 3)], lambda_rivals=0.3)
    value = method.later_loss(batch)["rivals"]
    features = method.network.features(batch.images)
    old = method.network.classify(features)[:, :2]
    core = core_pixels(batch.labels, 4)
    there = ((core == 1) | (core == 3)).all(0)
    assert 0 < there.sum() < there.numel()
    expected = 0.3 * sum(nn.functional.softplus(old[:, k][there]).mean() for k in range(2))
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in method.network.classifiers.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.network.body.parameters())


def test_permuted_classes_give_the_same_loss(at_second):
    method, batch = at_second(groups=[(1, 2), (3, 4)], compat=("trunc",))
    method.spreads.zero_()
    method.norms[:, 1] = 0
    natural = method.later_loss(batch)
    table = torch.arange(256)
    table[[3, 4]] = torch.tensor([4, 2])  # another naming of the same classes, in another learning order
    method.new = (2, 4)
    newest = method.network.classifiers[-1]
    with torch.no_grad():
        newest.weight.copy_(newest.weight.flip(0))
        newest.bias.copy_(newest.bias.flip(0))
    permuted = method.later_loss(batch._replace(labels=table[batch.labels]))
    for name, value in natural.items():
        torch.testing.assert_close(permuted[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["no replay", "no background", "only ignored", "class absent"])
def test_empty_parts_are_finite(at_second, case):
    method, batch = at_second(groups=[(2, 4), (1, 3)])
    labels = batch.labels
    match case:
        case "no replay":
            method.replay_amounts.zero_()
        case "no background":
            labels = torch.full_like(labels, 1)
        case "only ignored":
            labels = torch.full_like(labels, IGNORE)
        case "class absent":
            labels = labels.where(labels != 3, 0)
    terms = method.later_loss(batch._replace(labels=labels))
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
    zero = {"no replay": {"replay"}, "class absent": set()}.get(case, {"background", "ocfm"})
    assert {name for name, value in terms.items() if name != "sad" and float(value.detach()) == 0.0} == zero


def test_bfloat16_is_close_to_float32(at_second):
    method, batch = at_second()

    def total(enabled):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.stack(list(method.later_loss(batch).values())).sum()

    half, full = total(True), total(False)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=1e-2, atol=1e-2)
    half.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_a_resumed_task_replays_the_same(make_blocks, make_setup, learn, first_batch):
    stream, method = make_blocks(GROUPS), star(make_setup)
    learn(method, stream, 0)
    sealed = {k: v.clone() for k, v in method.state_dict().items()}
    learn(method, stream, 1, phases=1)
    saved = {k: v.clone() for k, v in method.state_dict().items()}
    assert {"replay_amounts", "repeat_factor"} <= set(saved)

    again = star(make_setup)
    again.begin(stream.tasks[0])
    restore(again, sealed)
    again.begin(stream.tasks[1])
    restore(again, saved)
    batch = batches_of(stream, 1, method, first_batch)
    losses = []
    for one in (method.train(), again.train()):
        torch.manual_seed(3)
        losses.append(one.later_loss(batch))
    assert torch.equal(method.replay_amounts, again.replay_amounts)
    assert torch.equal(method.repeat_factor, again.repeat_factor)
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_compat_spread_around_another_class(make_blocks, make_setup, learn):
    stream, methods = make_blocks(GROUPS), {}
    for name, compat in (("fixed", ()), ("published", ("spread_index",))):
        methods[name] = star(make_setup, compat=compat)
        for index in range(2):
            learn(methods[name], stream, index)
    fixed, published = methods["fixed"], methods["published"]
    assert torch.equal(fixed.prototypes, published.prototypes)
    assert torch.equal(fixed.spreads[:2], published.spreads[:2])  # the first task is not affected
    shift = (fixed.prototypes[2] - fixed.prototypes[0]).double()
    assert published.spreads[2].norm() > fixed.spreads[2].norm()
    # mean (u - p0)^2 = mean (u - p2)^2 + 2 (mean u - p2)(p2 - p0) + (p2 - p0)^2, and mean u is parallel to p2
    assert published.spreads[2].square().sum() <= fixed.spreads[2].square().sum() + shift.square().sum() + 1e-6


def test_a_class_without_cells_is_never_replayed(make_blocks, make_setup, learn):
    stream, method = make_blocks(GROUPS, recurs=False), star(make_setup)
    learn(method, stream, 0)
    method.prototypes[1] = 0
    learn(method, stream, 1, phases=1)
    assert method.replay_amounts[0] > 0 and method.replay_amounts[1] == 0


def test_a_set_smaller_than_a_batch(make_blocks, make_setup, learn):
    stream, method = make_blocks(GROUPS, count=3), star(make_setup, training={"batch_size": 24, "epochs": 1})
    for index in range(2):
        assert len(learn(method, stream, index)["train"]) == 1


def test_replay_in_chunks_is_the_same_expectation(at_second):
    method, _ = at_second(compat=("trunc",))
    method.spreads.zero_()
    method.norms[:, 1] = 0
    values = []
    for chunk in (1, 3, 16384):
        method.options = method.options.model_copy(update={"replay_chunk": chunk})
        values.append(method._replay())
    for value, number in values[1:]:
        torch.testing.assert_close(value, values[0][0])
        assert number == values[0][1] > 0


def test_core_pixels_are_needed_only(at_second):
    method, batch = at_second()
    _, pseudo_labels = method._ask_old_network(batch)
    assert pseudo_labels.shape == core_pixels(batch.labels, 4).shape


def test_phases_take_the_recipes_lengths_and_rates(make_blocks, make_setup, learn):
    training = {"epochs": 2, "later_epochs": 1, "lr": 0.02, "freeze_norm": False, "ema": 0.9, "clip": 1.0}
    stream, method = make_blocks(GROUPS), star(make_setup, training=training)
    for index in range(2):
        task = stream.tasks[index]
        method.begin(task)
        train = next(phase for phase in method.phases(task) if isinstance(phase, Train))
        optimizer = train.optimizer()
        assert (train.epochs, train.ema, train.clip) == ((2, 1)[index], 0.9, 1.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.02, 0.2] if index == 0 else [0.002, 0.2])
        assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["nesterov"]


def test_unknown_options_are_refused():
    for wrong in ({"compat": ("q1",)}, {"lambda_bce": 1}, {"bookkeeping": "both"}, {"replay_chunk": 0}):
        with pytest.raises(ValidationError):
            Star.Options(**wrong)
