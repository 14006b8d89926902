from __future__ import annotations

import pytest
import torch
from torch import nn

from perdure.errors import UsageError
from perdure.networks.deeplab import Aspp, deeplab, scaled_dilations
from perdure.networks.segmenter import Segmenter


def count(network: Segmenter) -> dict[str, int]:
    return {name: sum(p.numel() for p in part) for name, part in network.parameter_groups().items()}


@pytest.fixture(scope="module")
def paper() -> Segmenter:
    torch.manual_seed(0)
    network = deeplab("resnet101")
    for classes in (15, 1, 1):
        network.grow(classes)
    return network


@pytest.mark.golden
def test_parameter_counts_of_the_paper(paper: Segmenter) -> None:
    counts = count(paper)
    assert counts["backbone"] == 42_500_160
    assert counts["neck"] == 16_125_440
    assert counts["old_classifiers"] + counts["new_classifier"] == 4_369


def test_structure_of_the_paper(paper: Segmenter) -> None:
    trunk, neck = paper.body.backbone, paper.body.neck
    assert (paper.width, paper.stride, paper.dims) == (256, 16, 2)
    assert trunk.layer3[0].conv2.stride == (2, 2), "v1.5: the stride is in the 3x3 convolution"
    assert trunk.layer4[0].conv2.dilation == trunk.layer4[0].conv2.padding == (1, 1)
    assert trunk.layer4[0].conv2.stride == trunk.layer4[0].downsample[0].stride == (1, 1)
    assert {block.conv2.dilation for block in trunk.layer4[1:]} == {(2, 2)}
    assert {m.momentum for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}
    assert {m.momentum for m in neck.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert [branch[0].dilation[0] for branch in neck.branches] == [1, 6, 12, 18]
    assert [m.p for m in neck.modules() if isinstance(m, nn.Dropout)] == [0.1]
    assert all(m.bias is None for m in neck.modules() if isinstance(m, nn.Conv2d))
    assert neck.branches[0][0].weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.01)
    assert neck.refine[0].weight.std().item() == pytest.approx((2 / 2304) ** 0.5, rel=0.01)


def test_shapes_of_the_paper(paper: Segmenter) -> None:
    paper.eval()
    with torch.no_grad():
        logits, features = paper(torch.randn(1, 3, 32, 64))
    assert features.shape == (1, 256, 2, 4)
    assert logits.shape == (1, 17, 2, 4)
    assert features.min() >= 0
    assert features.max() > 0


@pytest.mark.golden
def test_parameter_counts_with_frozen_norm() -> None:
    network = deeplab("resnet101")
    for classes in (15, 1, 1):
        network.grow(classes)
    network.freeze_norm()
    assert list(count(network).values()) == [42_394_816, 16_121_856, 4_112, 257]


@pytest.mark.parametrize(("stride", "flags"), [(16, (False, False, True)), (8, (False, True, True))])
def test_the_backbone_is_torchvisions_dilated_resnet(stride: int, flags: tuple[bool, ...]) -> None:
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(weights=None, replace_stride_with_dilation=list(flags)).eval()
    ours = deeplab("resnet50", output_stride=stride, width=8).eval()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.body.backbone.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        y = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(y))))
        mine = ours.body.backbone(x)[-1]
        assert mine.shape == (1, 2048, 64 // stride, 64 // stride)
        assert torch.allclose(mine, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
        assert ours.features(x).shape == (1, 8, 64 // stride, 64 // stride)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_the_tiny_backbone_has_the_stride_asked_for(stride: int) -> None:
    network = deeplab("tiny_resnet", output_stride=stride, width=8, in_channels=1)
    network.grow(2)
    network.eval()
    logits, features = network(torch.randn(1, 1, 32, 64))
    assert features.shape == (1, 8, 32 // stride, 64 // stride)
    assert logits.shape == (1, 2, 32 // stride, 64 // stride)
    assert network.stride == stride
    assert network.body.backbone.bn1.momentum == 0.1
    assert sum(p.numel() for p in network.body.backbone.parameters()) < 400_000


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
@pytest.mark.parametrize("stride", [8, 16])
def test_other_timm_backbones_work_by_name(name: str, stride: int) -> None:
    network = deeplab(name, output_stride=stride, width=8, dilations=[1, 2])
    network.eval()
    assert network.features(torch.randn(1, 3, 32, 32)).shape == (1, 8, 32 // stride, 32 // stride)
    assert len(network.body.neck.branches) == 3


def test_default_dilations_scale_with_stride_and_size() -> None:
    assert scaled_dilations(16) == (6, 12, 18)
    assert scaled_dilations(8) == (12, 24, 36)
    assert scaled_dilations(16, 256) == (3, 6, 9)
    assert scaled_dilations(4, 64) == (3, 6, 9)
    assert scaled_dilations(32, 16) == (1, 1, 1)


def test_a_batch_of_one_cannot_train_unless_norm_is_frozen() -> None:
    network = deeplab("tiny_resnet", output_stride=8, width=8)
    network.grow(2)
    one = torch.randn(1, 3, 32, 32)
    network.train()
    with pytest.raises(UsageError, match="batch of one image") as caught:
        network(one)
    assert "freeze" in caught.value.hint
    network(torch.randn(2, 3, 32, 32))
    network.freeze_norm()
    network.train()(one)[0].sum().backward()
    assert network.body.backbone.conv1[0].weight.grad.abs().sum() > 0


def test_pooling_branch_equals_a_bilinear_resize() -> None:
    neck = Aspp(4, 3, (1,), 0.0).eval()
    x = torch.randn(2, 4, 5, 6)
    pooled = neck.pool(nn.functional.adaptive_avg_pool2d(x, 1))
    pooled = nn.functional.interpolate(pooled, size=(5, 6), mode="bilinear", align_corners=False)
    expected = neck.refine(neck.project(torch.cat([neck.branches[0](x), neck.branches[1](x), pooled], 1)))
    assert torch.allclose(neck(x), expected, atol=1e-6)


def test_the_tiny_network_learns_and_equal_seeds_learn_equally() -> None:
    def train() -> list[float]:
        torch.manual_seed(3)
        network = deeplab("tiny_resnet", output_stride=8, width=16)
        network.grow(1)
        images = torch.randn(4, 3, 32, 32)
        target = (torch.arange(4).view(1, 1, 1, 4).expand(4, 1, 4, 4) > 1).float()
        images += 2 * nn.functional.interpolate(target, size=(32, 32))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(12):
            loss = nn.functional.binary_cross_entropy_with_logits(network(images)[0], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first = train()
    assert first == train()
    assert first[-1] < 0.3 * first[0]


def test_channels_last_gives_the_same_features_in_the_same_layout() -> None:
    torch.manual_seed(0)
    network = deeplab("tiny_resnet", output_stride=8, width=8).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = network.features(x)
    network.to(memory_format=torch.channels_last)
    last = network.features(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(plain, last, atol=1e-5)
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("backbone", "options", "words"),
    [
        ("resnet181", {}, "unknown backbone 'resnet181'\ndid you mean 'resnet18'"),
        ("zzzz", {}, "for example resnet18"),
        ("tiny_resnt", {}, "did you mean 'tiny_resnet'"),
        ("resnet18.nope", {}, "no published weights 'nope'"),
        ("resnet18", {"output_stride": 12}, "output_stride 12"),
        ("tiny_resnet", {"output_stride": 32}, "use one of 4, 8, 16"),
        ("vit_tiny_patch16_224", {}, "cannot be built with output_stride 16"),
        ("tiny_resnet", {"dilations": []}, "dilations"),
        ("tiny_resnet", {"dilations": [0, 2]}, "dilations"),
        ("tiny_resnet", {"tiny_channels": [8, 8, 8]}, "tiny_channels"),
        ("tiny_resnet", {"width": 0}, "width"),
        ("tiny_resnet", {"dropout": 1.0}, "dropout"),
        ("tiny_resnet", {"input_size": 0}, "input_size is 0"),
        ("tiny_resnet", {"norm_momentum": 0}, "norm_momentum is 0"),
    ],
)
def test_what_cannot_be_built_is_a_plain_error(backbone: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        deeplab(backbone, **options)
    assert caught.value.hint
    assert "\n" not in caught.value.what
