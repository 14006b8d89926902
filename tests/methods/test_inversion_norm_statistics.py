"""Moments that a frozen copy of a network reports."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import PerdureError
from perdure.methods.ccsi.memory import class_moment_sums, class_moments
from perdure.methods.inversion.norm_statistics import InputMoments, NormStatsHook, Probe, hook_norms, segment_norms
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import ContinualNorm, continual_norms
from perdure.networks.cosine_resnet import cosine_resnet

SMALL_GROUPS = 9 * 4
SMALL_CHANNELS = 16 * 3 + 32 * 3 + 64 * 3


def tiny(norm: type[nn.Module] = ContinualNorm, seed: int = 0) -> Classifier:
    """Two norm layers, the second without bias before it; a few training batches give running statistics."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True),
        nn.AvgPool2d(2), nn.Flatten(),
    )  # fmt: skip
    network = Classifier(body, 32, in_channels=2)
    network.grow(3)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    network.train()
    for _ in range(3):
        network(3 * torch.randn(6, 2, 4, 4) + 1)
    return network.eval()


def inputs_of(network: nn.Module, kind: type[nn.Module], images: Tensor) -> list[Tensor]:
    """What each layer of a kind receives, by hooks."""
    seen: list[Tensor] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for part in network.modules()
        if isinstance(part, kind)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("norm", [ContinualNorm, nn.BatchNorm2d])
def test_probe_answers_as_the_network_does(norm):
    network, images = tiny(norm), torch.randn(6, 2, 4, 4)
    before = copy.deepcopy(network.state_dict())
    logits, features = network(images)
    found = Probe(network)(images)
    assert torch.allclose(found[0], logits, atol=1e-5)
    assert torch.allclose(found[1], features, atol=1e-5)
    assert all(torch.equal(now, before[name]) for name, now in network.state_dict().items())
    assert not any(isinstance(part, NormStatsHook) for part in network.modules())


@pytest.mark.parametrize("norm", [ContinualNorm, nn.BatchNorm2d])
def test_batch_moments_are_those_of_every_batchnorm_input(norm):
    network, images = tiny(norm), torch.randn(6, 2, 4, 4)
    seen = inputs_of(network, nn.BatchNorm2d, images)
    probe = Probe(network)
    mean, var = probe.batch_moments(probe(images)[2], groups=2)
    for group, part in enumerate((slice(0, 3), slice(3, 6))):
        expected = [u[part].mean((0, 2, 3)) for u in seen], [u[part].var((0, 2, 3), correction=0) for u in seen]
        assert torch.allclose(mean[group], torch.cat(expected[0]), atol=1e-5)
        assert torch.allclose(var[group], torch.cat(expected[1]), atol=1e-5)
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    assert torch.equal(probe.running_mean, torch.cat([part.running_mean for part in norms]))
    assert torch.equal(probe.running_var, torch.cat([part.running_var for part in norms]))


@pytest.mark.parametrize("norm", [ContinualNorm, nn.BatchNorm2d])
def test_layers_that_share_statistics_between_processes_are_hooked_too(norm):
    network, images = tiny(norm), torch.randn(6, 2, 4, 4)
    expected = Probe(network)(images)
    shared = Probe(nn.SyncBatchNorm.convert_sync_batchnorm(network).eval())
    found = shared(images)
    assert shared.layers == 2
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])


def test_group_moments_are_those_of_the_layer():
    network, images = tiny(), torch.randn(5, 2, 4, 4)
    seen = inputs_of(network, ContinualNorm, images)
    expected = [norm.group_moments(x) for norm, x in zip(continual_norms(network), seen, strict=True)]
    probe = Probe(network)
    mean, var = probe.channel_groups(probe(images)[2])
    assert torch.allclose(mean, torch.cat([pair[0] for pair in expected], 1), atol=1e-5)
    assert torch.allclose(var, torch.cat([pair[1] for pair in expected], 1), atol=1e-5)
    assert probe.group_layers.tolist() == [0] * 4 + [1] * 4


def test_moments_worked_by_hand():
    # One image, one channel 1, 2, 3, 6: mean 3, mean square 50/4 = 12.5, so the variance is 12.5 - 9 = 3.5.
    norm = nn.BatchNorm2d(1)
    network = Classifier(nn.Sequential(norm, nn.Flatten()), 4)
    network.grow(2)
    probe = Probe(network)
    raw = probe(torch.tensor([1.0, 2, 3, 6]).view(1, 1, 2, 2))[2]
    assert raw.mean.tolist() == [[3.0]]
    assert raw.square.tolist() == [[12.5]]
    mean, var = probe.batch_moments(raw, 1)
    assert (mean.item(), var.item()) == (3.0, 3.5)
    # A second image of 3, 3, 3, 3: together mean 3, mean square (12.5 + 9) / 2 = 10.75, variance 1.75.
    mean, var = probe.batch_moments(InputMoments(torch.tensor([[3.0], [3.0]]), torch.tensor([[12.5], [9.0]])), 1)
    assert (mean.item(), var.item()) == (3.0, 1.75)


def gradient(value: Tensor, images: Tensor) -> Tensor:
    return torch.autograd.grad(value, images)[0]


@pytest.mark.parametrize("norm", [ContinualNorm, nn.BatchNorm2d])
def test_gradients_are_those_of_the_plain_layers(norm):
    """Of logits and of both kinds of moments, in double precision, against autograd through the original layers."""
    network = tiny(norm).double()
    images = torch.randn(6, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 3, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)

    def value(logits: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (logits * weights[0]).sum() + (mean * weights[1]).sum() + (var.sqrt() * weights[1]).sum()

    seen: list[Tensor] = []
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits, _ = network(images)
    cut = [u.unflatten(0, (2, 3)) for u in seen]
    mean = torch.cat([u.mean((1, 3, 4)) for u in cut], 1)
    var = torch.cat([u.var((1, 3, 4), correction=0) for u in cut], 1)
    expected = gradient(value(logits, mean, var), images)

    probe = Probe(tiny(norm).double())
    logits, _, moments = probe(images)
    found = gradient(value(logits, *probe.batch_moments(moments, 2)), images)
    assert torch.allclose(found, expected, atol=1e-9)


def test_hook_passes_gradcheck():
    torch.manual_seed(1)
    norm = ContinualNorm(8).double()
    norm.batch.running_mean.normal_()
    nn.init.normal_(norm.batch.weight)
    hook = NormStatsHook(norm.eval())

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return hook(x), *hook.take()

    assert torch.autograd.gradcheck(run, torch.randn(2, 8, 3, 2, dtype=torch.float64, requires_grad=True))


def test_no_gradient_and_no_graph_for_parameters():
    network = tiny()
    probe = Probe(network)
    assert not probe(torch.randn(4, 2, 4, 4))[0].requires_grad  # nothing that the copy holds asks for gradients
    assert not any(part.requires_grad for part in probe.network.parameters())
    images = torch.randn(4, 2, 4, 4, requires_grad=True)
    probe(images)[0].sum().backward()
    assert images.grad is not None
    assert all(part.grad is None for part in (*network.parameters(), *probe.network.parameters()))


def test_small_network_has_the_published_layers():
    network = cosine_resnet(3)
    network.grow(2)
    probe = Probe(network)
    assert (probe.layers, probe.groups, len(probe.running_mean)) == (9, SMALL_GROUPS, SMALL_CHANNELS)
    assert len(hook_norms(copy.deepcopy(network))) == 9
    logits, _ = network.eval()(images := torch.rand(3, 3, 32, 32))
    assert torch.allclose(probe(images)[0], logits, atol=1e-5)


def test_bf16_is_near_and_keeps_moments_in_single_precision():
    network = cosine_resnet(3)
    network.grow(2)
    network.train()(images := torch.rand(8, 3, 32, 32))
    exact, rough = (Probe(network, bf16)(images) for bf16 in (False, True))
    assert rough[2].mean.dtype == rough[0].dtype == torch.float32
    assert not torch.equal(exact[0], rough[0])
    assert torch.allclose(exact[0], rough[0], atol=0.02)
    assert torch.allclose(exact[2].square, rough[2].square, rtol=0.05, atol=0.02)


def test_segment_norms_and_their_gradient_at_zero():
    values = torch.tensor([[3.0, 4.0, 0.0, 0.0]], requires_grad=True)
    norms = segment_norms(values, torch.tensor([0, 0, 1, 1]), 2)
    assert norms.tolist() == [[5.0, 0.0]]  # √(9 + 16), √0
    norms.sum().backward()
    assert values.grad is not None
    assert torch.allclose(values.grad, torch.tensor([[0.6, 0.8, 0.0, 0.0]]))


def test_class_moments_add_up_over_batches():
    network, images, codes = tiny(), torch.randn(10, 2, 4, 4), torch.arange(10) % 3
    parts = [class_moment_sums(network, images[i : i + 4], codes[i : i + 4], 3) for i in (0, 4, 8)]
    found = class_moments({name: sum(part[name] for part in parts) for name in parts[0]})
    assert found.shape == (3, 8, 4)
    norms, seen = continual_norms(network), inputs_of(network, ContinualNorm, images)
    mean, var = (torch.cat(part, 1) for part in zip(*map(ContinualNorm.group_moments, norms, seen), strict=True))
    for k in range(3):
        mine = torch.stack([mean[codes == k], var[codes == k]], 2)
        expected = torch.cat([mine.mean(0), mine.std(0, correction=0)], 1)
        assert torch.allclose(found[k], expected, atol=1e-5)


def test_broken_networks_are_refused():
    network = tiny()
    with torch.no_grad():
        network.head.rows[0][0, 0] = torch.nan
    with pytest.raises(PerdureError, match="not finite"):
        Probe(network)
    plain = Classifier(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()), 16)
    plain.grow(2)
    with pytest.raises(PerdureError, match="no batch normalisation"):
        Probe(plain)


def test_normalisation_without_scale_and_shift():
    norm = nn.BatchNorm2d(3, affine=False)
    norm(torch.randn(4, 3, 5, 5))
    x = torch.randn(2, 3, 4, 4)
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, eps=norm.eps)
    assert torch.allclose(NormStatsHook(norm)(x), expected, atol=1e-6)
