from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perdure.errors import UsageError
from perdure.networks.build import NETWORKS, build_network, network_options
from perdure.networks.classifier import Classifier
from perdure.networks.segmenter import Segmenter


# clip_segmenter has no classifiers; its tests are in tests/networks/clip
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"clip_segmenter"}))
def test_every_network_builds_in_every_dimension_it_claims(name: str) -> None:
    small = {
        "deeplab": {"backbone": "tiny_resnet", "output_stride": 8, "width": 8},
        "residual_unet": {"widths": [4, 8]},
        "unit_unet": {"widths": [4, 8]},
        "cosine_resnet": {"side": 16},
    }
    made = {"segmentation": Segmenter, "classification": Classifier}[NETWORKS[name].kind]
    for dims in NETWORKS[name].dims:
        network = build_network(name, dims, 1, **small[name])
        network.grow(2)
        logits, features = network(torch.randn(2, 1, *[16] * dims))
        assert isinstance(network, made)
        if isinstance(network, Classifier):
            assert features.shape == (2, network.width)
            assert logits.shape == (2, 2)
            continue
        assert network.dims == dims
        assert features.shape == (2, network.width, *[16 // network.stride] * dims)
        assert logits.shape == (2, 2, *features.shape[2:])


def test_options_are_those_of_the_builder() -> None:
    options = network_options("deeplab")
    assert options["width"] == 256
    assert options["backbone"] == "resnet101"
    assert options["weights"] == "random"
    assert "in_channels" not in options
    assert set(network_options("residual_unet")) == {"widths", "norm", "strides"}
    assert network_options("cosine_resnet") == {
        "size": "small",
        "norm": "continual",
        "norm_groups": 4,
        "norm_momentum": 0.1,
        "final_relu": None,
        "side": None,
        "group_statistics": False,
    }


@pytest.mark.parametrize(
    ("name", "dims", "options", "words"),
    [
        ("deeplap", 2, {}, "unknown network 'deeplap'\ndid you mean 'deeplab'"),
        ("deeplab", 3, {}, "does not work in 3D\nnetworks that do: residual_unet"),
        ("deeplab", 5, {}, "networks that do: none"),
        ("deeplab", 2, {"widht": 8}, "no option 'widht'\ndid you mean 'width'"),
        ("residual_unet", 2, {"in_chanels": 8}, "no option 'in_chanels'"),
        ("deeplab", 2, {"width": "wide"}, "option 'width'.*integer"),
        ("deeplab", 2, {"dilations": 6}, "option 'dilations'"),
        ("residual_unet", 2, {"norm": "layer"}, "option 'norm'"),
        ("residual_unet", 3, {"strides": [2]}, "do not fit 4 levels"),
        ("cosine_resnet", 3, {}, "does not work in 3D"),
        ("cosine_resnet", 2, {"size": "medium"}, "option 'size'"),
        ("cosine_resnet", 2, {"norm": "group"}, "option 'norm'"),
        ("cosine_resnet", 2, {"final_relu": "perhaps"}, "option 'final_relu'"),
        ("cosine_resnet", 2, {"norm_groups": 4.5}, "option 'norm_groups'"),
        ("cosine_resnet", 2, {"norm_grups": 4}, "no option 'norm_grups'\ndid you mean 'norm_groups'"),
        ("cosine_resnet", 2, {"side": 12}, "too small\nuse 13"),
    ],
)
def test_wrong_names_and_values_are_plain_errors(name: str, dims: int, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build_network(name, dims, 3, **options)
    assert caught.value.hint
    assert "\n" not in caught.value.what


def test_the_table_does_not_import_torch() -> None:
    code = "import sys, perdure.networks.build; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    src = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run([sys.executable, "-c", code], cwd=src, check=False)
    assert done.returncode == 0


def test_a_builder_of_ones_own_makes_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text("def number(dims, in_channels):\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="network 'own_networks:number' made a int, not a network"):
        build_network("own_networks:number", 2, 3)
    with pytest.raises(UsageError, match="'own_networks:nothing' cannot be imported: AttributeError"):
        build_network("own_networks:nothing", 2, 3)
