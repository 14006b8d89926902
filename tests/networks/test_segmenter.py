from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.layers import freeze_affine, hold_dropout, hold_norm, init_kaiming, sync_batch_norm
from perdure.networks.segmenter import Segmenter, upsample


class Body(nn.Module):
    """Stride 2 in two or three dimensions, with a norm, dropout and a neck."""

    def __init__(self, dims: int, width: int = 6) -> None:
        super().__init__()
        conv, norm, drop = (
            (nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d, nn.Dropout3d)
        )
        self.trunk = nn.Sequential(conv(3, 4, 3, 2, 1), norm(4), nn.ReLU())
        self.neck = nn.Sequential(drop(0.5), conv(4, width, 1), nn.GroupNorm(2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.trunk(x))


def make(dims: int = 2, classes: tuple[int, ...] = (3, 2)) -> Segmenter:
    torch.manual_seed(0)
    network = Segmenter(Body(dims), 6, 2, dims, in_channels=3)
    for number in classes:
        network.grow(number)
    return network


def image(dims: int, n: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, *[8] * dims)


def test_the_segmenter_computes_logits_at_feature_resolution_in_task_order() -> None:
    for dims in (2, 3):
        network = make(dims).eval()
        logits, features = network(image(dims))
        assert logits.shape == (2, 5, *[4] * dims)
        assert features.shape == (2, 6, *[4] * dims)
        assert torch.equal(logits[:, :3], network.classifiers[0](features))
        assert torch.equal(logits[:, 3:], network.classifiers[1](features))


def test_classify_takes_a_slice_of_the_classifiers() -> None:
    network = make(classes=(3, 2, 4))
    features = torch.randn(1, 6, 7, 1)  # replayed vectors laid out as a map
    logits = network.classify(features)
    assert logits.shape == (1, 9, 7, 1)
    assert torch.equal(network.classify(features, -1), logits[:, 5:])
    assert torch.equal(network.classify(features, 1), logits[:, 3:])
    assert network.classify(features, 3).shape == (1, 0, 7, 1)


def test_classifiers_act_on_every_position_alone() -> None:
    network = make()
    features = torch.randn(1, 6, 12, 1)
    order = torch.randperm(12)
    moved = network.classify(features[:, :, order])
    assert torch.allclose(moved, network.classify(features)[:, :, order], atol=1e-6)


def test_a_classifier_gives_channels_in_the_order_of_its_rows() -> None:
    network = make(classes=(4,))
    features = torch.randn(2, 6, 3, 3)
    before = network.classify(features)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        network.classifiers[0].weight.copy_(network.classifiers[0].weight[order])
        network.classifiers[0].bias.copy_(network.classifiers[0].bias[order])
    assert torch.allclose(network.classify(features), before[:, order], atol=1e-6)


def test_growing_leaves_old_weights_and_logits_alone() -> None:
    network = make().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    old = network(image(2))[0]
    network.grow(7)
    assert all(torch.equal(before[name], network.state_dict()[name]) for name in before)
    assert len(network.state_dict()) == len(before) + 2
    assert torch.equal(network(image(2))[0][:, :5], old)
    assert not network.classifiers[-1].training
    with pytest.raises(ValueError, match="at least one"):
        network.grow(0)


def test_new_classifiers_have_the_published_initialisation() -> None:
    torch.manual_seed(0)
    network = Segmenter(nn.Conv2d(3, 256, 1), 256, 1, 2)
    network.grow(400)
    weight, bias = network.classifiers[0].weight, network.classifiers[0].bias
    assert weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3
    assert bias.abs().max().item() <= 1 / 16
    assert bias.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.1)


def test_growing_is_a_function_of_the_seed_and_follows_the_dtype() -> None:
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), make().parameters(), strict=True))
    network = make().double()
    network.grow(2)
    assert network.classifiers[-1].weight.dtype == torch.float64


def test_frozen_normalisation_survives_train_mode() -> None:
    network = make()
    network.freeze_norm()
    network.train()
    norm, group, dropout, conv = (
        network.body.trunk[1],
        network.body.neck[2],
        network.body.neck[0],
        network.body.trunk[0],
    )
    assert network.training
    assert conv.training
    assert not norm.training
    assert dropout.training, "normalisation does not decide dropout"
    network.freeze_dropout()
    network.eval().train()
    assert not dropout.training
    before = norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()
    first = network(image(2))[0]
    first.square().sum().backward()
    assert torch.equal(first, network(image(2))[0]), "dropout is off"
    assert torch.equal(before[0], norm.running_mean)
    assert torch.equal(before[1], norm.running_var)
    assert torch.equal(before[2], norm.num_batches_tracked)
    assert norm.weight.grad is None
    assert group.bias.grad is None
    assert conv.weight.grad.abs().sum() > 0
    assert not copy.deepcopy(network).eval().train().body.trunk[1].training


def test_without_freezing_the_statistics_move() -> None:
    network = make().train()
    before = network.body.trunk[1].running_mean.clone()
    network(image(2))
    assert not torch.equal(before, network.body.trunk[1].running_mean)
    assert network.body.neck[0].training


def test_freezing_follows_the_network_inside_another_module() -> None:
    outer = nn.ModuleDict({"network": make()})
    outer["network"].freeze_norm()
    outer.eval()
    outer.train()
    assert not outer["network"].body.trunk[1].training
    assert outer["network"].body.trunk[0].training


def test_groups_hold_every_trainable_parameter_once() -> None:
    network = make(classes=(3, 2, 4))
    groups = network.parameter_groups()
    assert list(groups) == ["backbone", "neck", "old_classifiers", "new_classifier"]
    ids = [id(p) for part in groups.values() for p in part]
    assert sorted(ids) == sorted(id(p) for p in network.parameters())
    assert [tuple(p.shape[:1]) for p in groups["old_classifiers"]] == [(3,), (3,), (2,), (2,)]
    assert groups["new_classifier"][0] is network.classifiers[2].weight
    network.freeze_old_classifiers()
    network.freeze_norm()
    groups = network.parameter_groups()
    assert groups["old_classifiers"] == []
    assert len(groups["new_classifier"]) == 2
    assert all(p.requires_grad for part in groups.values() for p in part)
    assert len(groups["backbone"]) == 2
    assert len(groups["neck"]) == 2


def test_old_classifiers_get_no_gradient_once_frozen() -> None:
    network = make()
    network(image(2))[0].sum().backward()
    assert network.classifiers[0].weight.grad is not None
    network.freeze_old_classifiers()
    network(image(2))[0].sum().backward()
    assert network.classifiers[0].weight.grad is None
    assert network.classifiers[0].bias.grad is None
    assert network.classifiers[1].weight.grad is not None


def test_groups_before_the_first_task_have_no_classifiers() -> None:
    groups = make(classes=()).parameter_groups()
    assert groups["new_classifier"] == groups["old_classifiers"] == []
    assert groups["backbone"]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 8, 9), "8×9: the axes must be multiples of 2×2"),
        ((1, 3, 0, 8), "0×8"),
        ((1, 3, 8, 8, 8), "2D images"),
        ((3, 8, 8), "2D images"),
        ((1, 1, 8, 8), "3 channels, not 1"),
    ],
)
def test_inputs_that_do_not_fit_are_plain_errors(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make()(torch.zeros(shape))
    assert caught.value.hint
    assert "\n" not in caught.value.what


def test_check_size_proposes_a_size_that_fits() -> None:
    network = Segmenter(nn.Identity(), 3, 16, 2)
    with pytest.raises(UsageError, match="for example 512×16"):
        network.check_size((513, 5))
    with pytest.raises(UsageError, match="3 axes"):
        network.check_size((16, 16, 16))
    network.check_size((512, 16))
    with pytest.raises(UsageError, match="not 4"):
        Segmenter(nn.Identity(), 3, 16, 4)


def test_upsample_is_linear_without_aligned_corners() -> None:
    line = torch.tensor([0.0, 1.0])
    assert upsample(line.view(1, 1, 1, 2), (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]
    assert upsample(line.view(1, 1, 1, 1, 2), (2, 1, 4)).shape == (1, 1, 2, 1, 4)
    same = torch.randn(1, 2, 3, 3)
    assert upsample(same, same.shape[2:]) is same
    assert upsample(same[:, :0], (3, 3)).shape == (1, 0, 3, 3)


def test_batch_norm_is_shared_only_between_processes_on_gpus() -> None:
    network = make()
    assert sync_batch_norm(network) is network
    assert isinstance(network.body.trunk[1], nn.BatchNorm2d)


def test_sync_batch_norm_converts_for_gpu_processes_and_keeps_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    network = make()
    network.freeze_norm()
    weight = network.body.trunk[1].weight
    assert sync_batch_norm(network) is network
    assert isinstance(network.body.trunk[1], nn.BatchNorm2d), "parameters are on a CPU"
    sync_batch_norm(network, "cuda")
    assert isinstance(network.body.trunk[1], nn.SyncBatchNorm)
    assert network.body.trunk[1].weight is weight
    assert not weight.requires_grad
    assert not network.train().body.trunk[1].training
    assert sync_batch_norm(nn.Identity(), None) is not None


def test_layers_helpers_cover_every_kind() -> None:
    from timm.layers import BatchNormAct2d, DropPath

    stack = nn.Sequential(
        nn.Conv2d(8, 8, 3),
        nn.ConvTranspose2d(64, 8, 2, 2),
        BatchNormAct2d(8),
        nn.InstanceNorm2d(8, affine=True),
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        DropPath(0.5),
        nn.Dropout(0.5),
        nn.GroupNorm(2, 8, affine=False),
    )
    init_kaiming(stack)
    assert stack[0].weight.std().item() == pytest.approx((2 / 72) ** 0.5, rel=0.15)
    assert stack[1].weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert stack[0].bias.abs().sum() == 0
    freeze_affine(stack)
    hold_norm(stack)
    assert [part.training for part in stack] == [True, True] + [False] * 4 + [True, True, False]
    hold_dropout(stack.train())
    assert [part.training for part in stack] == [True] * 6 + [False, False, True]
    assert [name for name, p in stack.named_parameters() if p.requires_grad] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
