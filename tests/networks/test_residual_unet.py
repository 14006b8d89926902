from __future__ import annotations

import pytest
import torch

from perdure.errors import UsageError
from perdure.networks.residual_unet import residual_unet


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_forward_and_backward_reach_every_parameter(dims: int, norm: str) -> None:
    torch.manual_seed(0)
    network = residual_unet(dims, 2, (4, 8, 8), norm=norm)
    network.grow(3)
    network.grow(1)
    logits, features = network(torch.randn(2, 2, *[8] * dims))
    assert features.shape == (2, 4, *[8] * dims)
    assert logits.shape == (2, 4, *[8] * dims)
    assert features.min() >= 0
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad.abs().sum() > 0 for name, p in network.named_parameters() if name.endswith("weight"))


def test_anisotropic_strides_decide_which_sizes_fit() -> None:
    network = residual_unet(3, 1, (4, 8, 8), strides=[[1, 2, 2], 2])
    assert network.multiple == (2, 4, 4)
    assert network.stride == 1
    assert network.features(torch.randn(1, 1, 2, 8, 12)).shape == (1, 4, 2, 8, 12)
    with pytest.raises(UsageError, match="3×8×12: the axes must be multiples of 2×4×4"):
        network.features(torch.randn(1, 1, 3, 8, 12))


def test_any_size_that_the_strides_divide_works() -> None:
    network = residual_unet(2, 1, (4, 4, 4)).eval()
    for size in ((8, 8), (12, 20), (4, 36)):
        assert network.features(torch.randn(1, 1, *size)).shape[2:] == size
    for size in ((8, 6), (7, 8)):
        with pytest.raises(UsageError, match="multiples of 4×4"):
            network.features(torch.randn(1, 1, *size))


def test_a_single_cell_at_the_bottom_is_a_plain_error_where_it_cannot_be_normalised() -> None:
    tiny = torch.randn(1, 1, 4, 4)
    with pytest.raises(UsageError, match="level 2 of the U-Net"):
        residual_unet(2, 1, (4, 4, 4), norm="instance").eval().features(tiny)
    with pytest.raises(UsageError, match="level 2 of the U-Net"):
        residual_unet(2, 1, (4, 4, 4), norm="batch").features(tiny)
    assert residual_unet(2, 1, (4, 4, 4), norm="batch").eval().features(tiny).shape == (1, 4, 4, 4)
    assert residual_unet(2, 1, (4, 4, 4), norm="group").features(tiny).shape == (1, 4, 4, 4)
    assert residual_unet(2, 1, (4, 4, 4), norm="batch").features(torch.cat([tiny, tiny])).shape[0] == 2


def test_one_level_is_allowed() -> None:
    assert residual_unet(2, 1, (4,)).features(torch.randn(1, 1, 5, 7)).shape == (1, 4, 5, 7)


def test_samples_of_a_batch_do_not_meet_and_equal_seeds_give_equal_networks() -> None:
    networks = []
    for _ in range(2):
        torch.manual_seed(5)
        networks.append(residual_unet(3, 1, (4, 8)))
    x = torch.randn(3, 1, 4, 4, 4)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(networks[0].features(x), networks[1].features(x))
    assert torch.allclose(networks[0].features(x[order]), networks[0].features(x)[order], atol=1e-6)


def test_everything_is_backbone_and_norms_can_be_frozen() -> None:
    network = residual_unet(2, 1, (4, 8), norm="batch")
    groups = network.parameter_groups()
    assert groups["neck"] == []
    assert len(groups["backbone"]) == len(list(network.body.parameters()))
    network.freeze_norm()
    network.train()
    before = network.body.stem.norm1.running_mean.clone()
    network.features(torch.randn(2, 1, 4, 4))
    assert torch.equal(before, network.body.stem.norm1.running_mean)
    assert len(network.parameter_groups()["backbone"]) < len(groups["backbone"])


@pytest.mark.parametrize(
    ("dims", "options", "words"),
    [
        (4, {}, "not 4"),
        (2, {"norm": "layer"}, "unknown norm 'layer'"),
        (2, {"widths": ()}, "widths"),
        (2, {"in_channels": 0}, "in_channels 0"),
        (2, {"strides": [2]}, "do not fit 4 levels in 2D"),
        (3, {"strides": [2, [1, 2], 2]}, "do not fit 4 levels in 3D"),
        (2, {"strides": [2, 0, 2]}, "do not fit"),
    ],
)
def test_what_cannot_be_built_is_a_plain_error(dims: int, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        residual_unet(dims, **options)
    assert caught.value.hint
