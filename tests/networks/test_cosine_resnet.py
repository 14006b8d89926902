from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from perdure.errors import UsageError
from perdure.networks.classifier import Classifier
from perdure.networks.continual_norm import ContinualNorm, continual_norms
from perdure.networks.cosine_resnet import BasicBlock, cosine_resnet
from perdure.networks.layers import batch_norms


def made(in_channels: int = 3, classes: int = 2, **options: object) -> Classifier:
    torch.manual_seed(0)
    network = cosine_resnet(in_channels, **options)
    network.grow(classes)
    return network


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.golden
@pytest.mark.parametrize("norm", ["batch", "continual"])
@pytest.mark.parametrize(
    ("channels", "classes", "parameters", "size"),
    [
        (3, 2, 77_905, 314_380),
        (3, 8, 79_441, 320_524),
        (3, 9, 79_697, 321_548),
        (1, 2, 77_617, 313_228),
        (1, 8, 79_153, 319_372),
        (1, 11, 79_921, 322_444),
    ],
)
def test_published_sizes(norm: str, channels: int, classes: int, parameters: int, size: int) -> None:
    network = made(channels, classes, norm=norm)
    assert count(network) == parameters
    assert sum(tensor.nbytes for tensor in network.state_dict().values()) == size


@pytest.mark.golden
def test_published_structure() -> None:
    network = made()
    images = torch.rand(2, 3, 32, 32)
    body = network.body
    assert body.stem(images).shape == (2, 16, 16, 16)
    assert [block.conv2.out_channels for block in body.blocks] == [16, 32, 64]
    maps = body.pool(body.blocks(body.stem(images)))
    assert maps.shape == (2, 64, 2, 2)
    assert network.width == 256
    names = [name for name, part in network.named_modules() if isinstance(part, ContinualNorm)]
    assert names == ["body.stem.1"] + [
        f"body.blocks.{k}.{part}"
        for k, parts in enumerate((("norm1", "norm2"), *(("norm1", "norm2", "skip.1"),) * 2))
        for part in parts
    ]
    assert len(batch_norms(network)) == len(continual_norms(network)) == 9
    assert [part.groups for part in continual_norms(network)] == [4] * 9
    assert not continual_norms(made(norm="batch"))
    assert len(batch_norms(made(norm="batch"))) == 9
    assert isinstance(body.blocks[0].skip, nn.Identity)
    convs = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs)
    assert [conv.stride for conv in convs] == [(2, 2)] + [(1, 1)] * 8


@pytest.mark.golden
def test_the_large_net_has_the_published_size() -> None:
    network = made(1, 2, size="large")
    assert count(network) == 700_433
    assert len(batch_norms(network)) == 21
    assert network.width == 128
    with torch.no_grad():
        features = network.eval()(torch.rand(1, 1, 224, 224))[1]
    assert features.shape == (1, 128)


def test_features_are_flattened_channel_by_channel_without_the_last_rows() -> None:
    network = made().eval()
    images = torch.rand(2, 3, 32, 32)
    body = network.body
    last = body.blocks(body.stem(images))
    features = network.features(images)
    torch.testing.assert_close(features[1, 4 * 10 + 1], last[1, 10, :7, 7:14].mean())
    torch.testing.assert_close(features[0, 4 * 63 + 2], last[0, 63, 7:14, :7].mean())
    layout = network.to(memory_format=torch.channels_last)
    again = layout.features(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(again, features, rtol=1e-4, atol=1e-5)


def test_a_block_is_two_convolutions_and_a_shortcut() -> None:
    torch.manual_seed(0)
    block = BasicBlock(4, 6, 2, nn.BatchNorm2d).eval()
    x = torch.randn(2, 4, 9, 9)
    inner = block.norm2(block.conv2(block.norm1(block.conv1(x)).relu()))
    kept = x.clone()
    assert torch.equal(block(x), (inner + block.skip(x)).relu())
    assert torch.equal(x, kept)
    assert block(x).shape == (2, 6, 5, 5)
    block.final_relu = False
    assert torch.equal(block(x), inner + block.skip(x))
    same = BasicBlock(4, 4, 1, nn.BatchNorm2d).eval()
    assert torch.equal(same(x), (same.norm2(same.conv2(same.norm1(same.conv1(x)).relu())) + x).relu())


@pytest.mark.parametrize(
    ("options", "negative"),
    [
        ({}, False),
        ({"final_relu": False}, True),
        ({"size": "large", "side": 193}, True),
        ({"size": "large", "side": 193, "final_relu": True}, False),
    ],
)
def test_the_last_relu_is_there_as_published_or_as_asked(options: dict[str, object], negative: bool) -> None:
    network = made(1, **options)
    side = int(options.get("side", 32))
    nn.init.constant_(network.body.blocks[-1].norm2.batch.bias, -1.0)  # pulls averages over 49 cells below 0
    with torch.no_grad():
        features = network(torch.rand(4, 1, side, side))[1]
    assert bool((features < 0).any()) is negative


def test_convolutions_are_kaiming_normal_by_fan_out() -> None:
    network = made()
    block = network.body.blocks[2]
    assert block.conv1.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert block.skip[0].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert abs(block.conv2.weight.mean().item()) < 1e-3
    for norm in batch_norms(network):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


def test_options_reach_every_normalisation() -> None:
    network = made(norm_groups=8, norm_momentum=1.0, group_statistics=True)
    assert {(part.groups, part.batch.momentum) for part in continual_norms(network)} == {(8, 1.0)}
    network(torch.rand(5, 3, 32, 32))
    assert {part.group_mean.shape for part in continual_norms(network)} == {(5, 8)}
    assert {part.momentum for part in batch_norms(made(norm="batch", norm_momentum=0.3))} == {0.3}
    assert {part.momentum for part in batch_norms(made())} == {0.1}


@pytest.mark.golden
def test_published_group_statistics_have_the_published_size() -> None:
    network = made(group_statistics=True)
    network(torch.rand(40, 3, 32, 32))
    kept = [buffer for name, buffer in network.named_buffers() if name.rpartition(".")[2].startswith("group_")]
    assert len(kept) == 18
    assert sum(buffer.nbytes for buffer in kept) == 11_520


@pytest.mark.parametrize(
    ("options", "width", "sides"),
    [
        ({}, 256, (27, 40)),
        ({"side": 28}, 256, (27, 40)),
        ({"side": 64}, 1024, (55, 68)),
        ({"side": 13}, 64, (13, 26)),
        ({"size": "large"}, 128, (193, 416)),
    ],
)
def test_the_side_decides_the_width(options: dict[str, object], width: int, sides: tuple[int, int]) -> None:
    network = made(1, **options).eval()
    assert network.width == width
    assert (network.sides[0], network.sides[-1]) == sides
    with torch.no_grad():
        for side in sides:
            assert network(torch.rand(1, 1, side, side))[1].shape == (1, width)
        assert network.body(torch.rand(1, 1, sides[1] + 1, sides[1] + 1)).shape[1] > width
    for size in ((sides[0] - 1,) * 2, (sides[1] + 1,) * 2, (sides[0], sides[1])):
        with pytest.raises(UsageError, match="square images of"):
            network.check_size(size)


def test_a_single_image_trains() -> None:
    for norm in ("batch", "continual"):
        network = made(norm=norm)
        logits, _ = network(torch.rand(1, 3, 32, 32))
        logits.sum().backward()
        assert network.body.stem[0].weight.grad.isfinite().all()
    assert network.least_batch == 1


def test_it_can_be_copied_in_the_middle_of_training() -> None:
    network = made(group_statistics=True)
    images = torch.rand(3, 3, 32, 32)
    logits, _ = network(images)
    teacher = copy.deepcopy(network).eval()
    before = teacher(images)[0]
    logits.sum().backward()
    network(images)
    assert torch.equal(teacher(images)[0], before)
    fresh = made(group_statistics=True)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(images)[0], network.eval()(images)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"side": 12}, "images of 12 pixels are too small\nuse 13 or more"),
        ({"size": "large", "side": 32}, "too small\nuse 193 or more"),
        ({"norm_groups": 5}, "16 channels cannot be normalised in 5 groups"),
        ({"norm_momentum": 0.0}, "momentum of 0 "),
        ({"norm": "batch", "norm_momentum": 2.0}, "momentum of 2 "),
        ({"norm": "batch", "group_statistics": True}, "need continual normalisation"),
        ({"in_channels": 0}, "0 channels"),
    ],
)
def test_what_cannot_be_built_is_a_plain_error(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        cosine_resnet(**options)
    assert caught.value.hint
    assert "\n" not in caught.value.what
