from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from perdure.engine.state import restore
from perdure.errors import UsageError
from perdure.networks.continual_norm import ContinualNorm, continual_norms
from perdure.networks.layers import NORMS, batch_norms, freeze_affine, hold_norm, sync_batch_norm, without_updates


def x(n: int = 6, channels: int = 8, height: int = 5, width: int = 7, seed: int = 0) -> Tensor:
    """Maps that are not square, with another mean and spread in every channel."""
    rng = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, channels).view(1, -1, 1, 1)
    return torch.randn(n, channels, height, width, generator=rng) * spread + spread - 1


def layer(statistics: bool = False, momentum: float = 0.1) -> ContinualNorm:
    torch.manual_seed(3)
    made = ContinualNorm(8, 4, momentum, group_statistics=statistics)
    nn.init.normal_(made.batch.weight, 1.0, 0.3)
    nn.init.normal_(made.batch.bias)
    return made


def grouped(maps: Tensor, groups: int = 4) -> Tensor:
    """u of spec 2.3, from its formula."""
    parts = maps.view(maps.shape[0], groups, -1)
    mean = parts.mean(2, keepdim=True)
    spread = (parts - mean).square().mean(2, keepdim=True)
    return ((parts - mean) / (spread + 1e-5).sqrt()).view_as(maps)


@pytest.mark.parametrize("train", [True, False])
def test_it_is_group_norm_then_batch_norm(train: bool) -> None:
    ours = layer()
    theirs = nn.Sequential(nn.GroupNorm(4, 8, affine=False), copy.deepcopy(ours.batch))
    for seed in range(3):  # running statistics that are neither the first nor the last batch's
        ours(x(seed=seed)), theirs(x(seed=seed))
    ours.train(train), theirs.train(train)
    left, right = x(seed=9).requires_grad_(), x(seed=9).requires_grad_()
    push = x(seed=10)
    a, b = ours(left), theirs(right)
    (a * push).sum().backward()
    (b * push).sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(left.grad, right.grad)
    assert left.grad.abs().sum() > 0
    assert torch.equal(ours.batch.weight.grad, theirs[1].weight.grad)
    assert torch.equal(ours.batch.bias.grad, theirs[1].bias.grad)
    for name, value in ours.batch.state_dict().items():
        assert torch.equal(value, theirs[1].state_dict()[name]), name
    assert int(ours.batch.num_batches_tracked) == 3 + train


def test_the_formula_of_the_paper() -> None:
    ours = layer()
    u = grouped(x())
    mean, biased = u.mean((0, 2, 3)), u.var((0, 2, 3), correction=0)
    unit = (u - mean.view(1, -1, 1, 1)) / (biased.view(1, -1, 1, 1) + 1e-5).sqrt()
    wanted = ours.batch.weight.view(1, -1, 1, 1) * unit + ours.batch.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(ours(x()), wanted, rtol=1e-4, atol=1e-5)
    unbiased = u.var((0, 2, 3), correction=1)
    torch.testing.assert_close(ours.batch.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.batch.running_var, 0.9 + 0.1 * unbiased, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(unbiased, x().var((0, 2, 3)), rtol=0.1), "moments of u, not of the input"

    ours.eval()
    running = ours.batch.running_mean.view(1, -1, 1, 1), ours.batch.running_var.view(1, -1, 1, 1)
    u = grouped(x(seed=1))
    unit = (u - running[0]) / (running[1] + 1e-5).sqrt()
    wanted = ours.batch.weight.view(1, -1, 1, 1) * unit + ours.batch.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(ours(x(seed=1)), wanted, rtol=1e-4, atol=1e-5)


def test_momentum_one_keeps_the_last_training_batch_alone() -> None:
    ours = layer(momentum=1.0)
    for seed in range(3):
        ours(x(seed=seed))
    u = grouped(x(seed=2))
    torch.testing.assert_close(ours.batch.running_mean, u.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.batch.running_var, u.var((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_the_input_of_the_inner_batch_norm_is_what_running_statistics_describe() -> None:
    ours, seen = layer(), []
    ours.batch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours(x())
    torch.testing.assert_close(seen[0], grouped(x()), rtol=1e-4, atol=1e-5)
    pair = nn.Sequential(ours, nn.GroupNorm(2, 8), nn.BatchNorm2d(8))
    assert [id(part) for part in batch_norms(pair)] == [id(ours.batch), id(pair[2])]
    assert continual_norms(pair) == [ours]


def test_batches_of_one_and_maps_of_any_shape() -> None:
    ours = layer(statistics=True)
    for shape in ((1, 8, 5, 7), (1, 8, 1, 9), (3, 8, 1, 1), (2, 8, 16, 4)):
        out = ours(x(*[shape[0], 8, *shape[2:]]))
        assert out.shape == shape
        assert out.isfinite().all()
    assert layer().eval()(x(1, 8, 1, 1)).isfinite().all()
    with pytest.raises(UsageError, match="one image whose map is a single cell") as caught:
        layer()(x(1, 8, 1, 1))
    assert "batch size of at least 2" in caught.value.hint


def test_group_moments_are_those_of_the_input_and_have_gradients() -> None:
    ours = layer()
    maps = x(3).double().requires_grad_()
    mean, var = ours.group_moments(maps)
    assert mean.shape == var.shape == (3, 4)
    parts = maps.detach().view(3, 4, 2 * 5 * 7)
    torch.testing.assert_close(mean.detach(), parts.mean(2))
    torch.testing.assert_close(var.detach(), parts.var(2, correction=0))
    mean.sum().backward()
    torch.testing.assert_close(maps.grad, torch.full_like(maps, 1 / 70))
    maps.grad = None
    ours.group_moments(maps)[1].sum().backward()
    wanted = (2 / 70 * (parts - parts.mean(2, keepdim=True))).view_as(maps)
    torch.testing.assert_close(maps.grad, wanted)
    assert ours.group_moments(x().bfloat16())[0].dtype == torch.float32
    last = x().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.group_moments(last)[1], ours.group_moments(x())[1])


def test_group_statistics_are_those_of_full_training_batches() -> None:
    ours = layer(statistics=True)
    ours.eval()(x(5))
    assert ours.group_mean is None
    assert list(ours.state_dict()) == list(layer().state_dict()), "nothing to save before the first batch"
    ours.train()
    for n, seed in ((6, 1), (4, 2), (6, 3), (7, 4)):  # 6 is the size of the first batch: the others do not count
        ours(x(n, seed=seed).requires_grad_())
    mean, var = ours.group_moments(x(6, seed=3))
    assert torch.equal(ours.group_mean, mean)
    assert torch.equal(ours.group_var, var)
    assert not ours.group_mean.requires_grad
    ours.eval()(x(6, seed=5))
    assert torch.equal(ours.group_mean, mean)
    hold_norm(ours.train())
    ours(x(6, seed=5))
    assert torch.equal(ours.group_mean, mean), "frozen normalisation"
    plain = layer()
    plain(x())
    assert plain.group_mean is None
    assert dict(plain.named_buffers()).keys() == dict(plain.batch.named_buffers(prefix="batch")).keys()


def test_group_statistics_survive_the_state_dict() -> None:
    ours, fresh = layer(statistics=True), layer(statistics=True)
    ours(x())
    assert {"group_mean", "group_var"} < set(ours.state_dict())
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.group_mean, ours.group_mean)
    assert torch.equal(fresh.group_var, ours.group_var)
    fresh(x(seed=1))
    assert not torch.equal(fresh.group_mean, ours.group_mean), "no shared storage"
    other = layer(statistics=True)
    other(x(3))
    other.load_state_dict(ours.state_dict())  # of another batch size
    assert torch.equal(other.group_var, ours.group_var)
    other.load_state_dict(layer(statistics=True).state_dict())  # saved before the first batch
    assert other.group_mean is None
    with pytest.raises(RuntimeError, match="group_mean"):
        layer().load_state_dict(ours.state_dict())


def test_group_statistics_survive_a_checkpoint() -> None:
    ours = nn.Sequential(layer(statistics=True))
    early = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours[0](x())
    fresh = nn.Sequential(layer(statistics=True))
    restore(fresh, ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    restore(fresh, early)
    assert fresh[0].group_var is None


@pytest.mark.parametrize("statistics", [True, False])
def test_it_can_be_copied_after_a_forward_pass_with_a_graph(statistics: bool) -> None:
    ours = layer(statistics)
    out = ours(x().requires_grad_())
    twin = copy.deepcopy(ours)
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    out.sum().backward()
    ours(x(seed=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    assert not torch.equal(ours.batch.running_mean, twin.batch.running_mean)
    storages = {t.data_ptr() for t in ours.state_dict().values()}
    assert not storages & {t.data_ptr() for t in twin.state_dict().values()}


@pytest.mark.parametrize("first", [True, False])
def test_without_updates_nothing_moves(first: bool) -> None:
    stack = nn.Sequential(layer(statistics=True), nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
    if not first:
        stack(x())
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    plain = copy.deepcopy(stack)(x(seed=1))
    with without_updates(stack):
        inside = stack(x(seed=1))
        with without_updates(stack[0]):
            stack(x(seed=2))
        stack(x(seed=3))
    assert torch.equal(plain, inside), "normalised by the moments of the batch all the same"
    assert list(stack.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())
    assert [part.track_running_stats for part in batch_norms(stack)] == [True, True, False]
    with pytest.raises(ZeroDivisionError), without_updates(stack):
        raise ZeroDivisionError
    stack(x(seed=1))
    assert not torch.equal(stack[0].batch.running_mean, before["0.batch.running_mean"]), "only inside"
    assert not torch.equal(stack[1].running_var, before["1.running_var"])
    assert torch.equal(stack[0].group_mean, stack[0].group_moments(x(seed=1))[0])


def test_without_updates_leaves_frozen_layers_and_gradients_alone() -> None:
    ours = layer()
    ours(x())
    hold_norm(ours)
    frozen = ours(x(seed=1))
    with without_updates(ours):
        assert torch.equal(ours(x(seed=1)), frozen), "by running statistics, as outside"
    ours.train()
    left, right = x(seed=1).requires_grad_(), x(seed=1).requires_grad_()
    with without_updates(ours):
        ours(left).square().mul(x(seed=2)).sum().backward()
    ours(right).square().mul(x(seed=2)).sum().backward()
    assert torch.equal(left.grad, right.grad)


def test_freezing_finds_the_batch_norm_inside() -> None:
    ours = layer()
    assert [id(part) for part in ours.modules() if isinstance(part, NORMS)] == [id(ours.batch)]
    ours(x())
    before = ours.batch.running_mean.clone()
    freeze_affine(ours)
    hold_norm(ours)
    assert ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    ours(x(seed=1))
    assert torch.equal(ours.batch.running_mean, before)


def test_between_processes_on_gpus_the_inner_batch_norm_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = nn.Sequential(layer(statistics=True))
    with monkeypatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: True)
        patched.setattr(torch.distributed, "get_world_size", lambda: 2)
        sync_batch_norm(stack, "cuda")
    assert isinstance(stack[0].batch, nn.SyncBatchNorm)
    assert batch_norms(stack) == [stack[0].batch]
    reference = layer(statistics=True)
    assert torch.equal(stack(x()), reference(x())), "alone, it computes the same"
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    with without_updates(stack):
        stack(x(seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())
    assert torch.equal(stack[0].group_mean, reference.group_mean)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": 10, "groups": 4}, "10 channels cannot be normalised in 4 groups"),
        ({"channels": 8, "groups": 0}, "0 groups"),
        ({"channels": 8, "momentum": 0.0}, "momentum of 0 "),
        ({"channels": 8, "momentum": 1.5}, "momentum of 1.5"),
    ],
)
def test_values_that_make_no_sense_are_plain_errors(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        ContinualNorm(**arguments)
    assert caught.value.hint
