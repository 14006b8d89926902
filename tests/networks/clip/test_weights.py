"""CLIP weights from files: every published layout, and files that cannot be used. Nothing in a file is run."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from perdure.errors import DataError, PerdureError
from perdure.files import sha256
from perdure.networks.build import build_network
from perdure.networks.clip.encoder import ClipEncoder, VitShape, resize_positions
from perdure.networks.clip.torchscript import read_torchscript
from perdure.networks.clip.weights import load_clip_weights, read_clip

POSITIONS = "vision_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize("layout", ["torchscript", "torch", "safetensors", "open_clip", "hugging_face"])
def test_every_layout_gives_the_output_of_the_model_that_was_saved(
    clip: nn.Module, encoder: ClipEncoder, published: Callable[[str], Path], layout: str
) -> None:
    path = published(layout)
    record = load_clip_weights(encoder, path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).cls, F.normalize(clip.visual(images), dim=1), rtol=1e-5, atol=1e-5)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    assert (record.source, record.sha256) == (str(path), sha256(file))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_archive_in_half_precision_is_widened(clip: nn.Module, encoder: ClipEncoder, tmp_path: Path) -> None:
    visual = torch.jit.trace(copy.deepcopy(clip.visual), torch.randn(1, 3, 32, 32))
    torch.jit.save(visual.half(), str(tmp_path / "half.pt"))
    found = read_torchscript(tmp_path / "half.pt")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        name: tuple(t.shape) for name, t in clip.visual.state_dict().items()
    }
    torch.testing.assert_close(found["proj"], clip.visual.proj.detach().half())


def test_archives_give_what_torch_reads(archive: Path, clip: nn.Module) -> None:
    found, expected = read_torchscript(archive), clip.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_views_and_buffers_of_an_archive_are_read(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0).reshape(3, 4)
            self.register_buffer("turned", whole.T)
            self.register_buffer("part", whole[1:, 2])
            self.register_buffer("scalar", torch.tensor(7))
            self.register_buffer("empty", torch.zeros(0, 2))
            self.names = [1, 2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scalar

    torch.jit.save(torch.jit.script(Odd()), str(tmp_path / "odd.pt"))
    found = read_torchscript(tmp_path / "odd.pt")
    assert found["turned"].tolist() == torch.arange(12.0).reshape(3, 4).T.tolist()
    assert found["part"].tolist() == [6.0, 10.0]
    assert found["scalar"].item() == 7
    assert found["empty"].shape == (0, 2)


def test_the_network_is_built_with_weights_and_remembers_them(published: Callable[[str], Path]) -> None:
    path = published("safetensors")
    sizes = {"patch": 8, "width": 128, "depth": 3, "heads": 2, "dim": 32, "feature_blocks": [0, 1, 2]}
    network = build_network("clip_segmenter", 2, 3, encoder=sizes, input_size=64, weights=str(path))
    assert network.weights.sha256 == sha256(path)
    found = read_clip(path).tensors[POSITIONS]
    assert torch.equal(network.encoder.state_dict()[POSITIONS], resize_positions(found, (8, 8)))


def test_images_with_one_channel_take_the_sum_of_the_colours(published: Callable[[str], Path]) -> None:
    path = published("safetensors")
    shape = VitShape(patch=8, width=128, depth=3, heads=2, dim=32, feature_blocks=(2,))
    grey = ClipEncoder(shape, 32, in_channels=1)
    load_clip_weights(grey, path)
    weight = grey.vision_model.embeddings.patch_embedding.weight
    torch.testing.assert_close(weight, load_file(path)["visual.conv1.weight"].sum(1, keepdim=True))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "ran")


def rewritten(archive: Path, path: Path, entry: str, content: bytes, compress: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with another content of one member."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name.endswith(entry):
                new.writestr(name, content, compress)
            else:
                new.writestr(name, old.read(name))
    return path


def test_an_archive_with_code_in_its_pickle_is_refused_and_not_run(archive: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bad = rewritten(archive, tmp_path / "bad.pt", "/data.pkl", pickle.dumps(Evil(mark), protocol=2))
    with pytest.raises(DataError, match=r"asks for the Python object .*; nothing in it was run"):
        read_clip(bad)
    assert not mark.exists()


@pytest.mark.parametrize("name", [("builtins", "eval"), ("os", "system"), ("torch", "load"), ("torch.hub", "load")])
def test_no_other_object_can_be_named_in_an_archive(archive: Path, tmp_path: Path, name: tuple[str, str]) -> None:
    module, attribute = name
    content = f"c{module}\n{attribute}\n(S'x'\ntR.".encode()
    with pytest.raises(DataError, match=f"asks for the Python object '{module}.{attribute}'"):
        read_clip(rewritten(archive, tmp_path / "bad.pt", "/data.pkl", content))


def test_code_beside_the_pickle_is_never_looked_at(archive: Path, tmp_path: Path, clip: nn.Module) -> None:
    with zipfile.ZipFile(archive) as opened:
        sources = [name for name in opened.namelist() if name.endswith(".py")]
    assert sources
    strange = rewritten(archive, tmp_path / "strange.pt", ".py", b"this is no TorchScript")
    assert set(read_clip(strange).tensors) == set(read_clip(archive).tensors)


def storage_pickle(size: str, stride: str, count: int = 4) -> bytes:
    """A module with one tensor, written by hand: storage 0, offset 0."""
    return (
        b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + f"I{count}\ntQI0\n({size}t({stride}t".encode()
        + b"I00\nccollections\nOrderedDict\n)RtRub."
    )


def test_a_tensor_stays_within_its_storage(archive: Path, tmp_path: Path) -> None:
    good = rewritten(archive, tmp_path / "good.pt", "/data.pkl", storage_pickle("I2\nI2\n", "I2\nI1\n"))
    assert read_torchscript(good)["w"].shape == (2, 2)
    bad = [("I2\nI3\n", "I2\nI1\n"), ("I2\nI2\n", "I9\nI1\n"), ("I-1\n", "I1\n"), ("I99999999\n", "I0\n")]
    for number, (size, stride) in enumerate(bad):
        path = rewritten(archive, tmp_path / f"{number}.pt", "/data.pkl", storage_pickle(size, stride))
        with pytest.raises(DataError, match="is a damaged TorchScript archive"):
            read_torchscript(path)
    beyond = storage_pickle("I2\n", "I1\n", count=1 << 40)
    with pytest.raises(DataError, match="is a damaged TorchScript archive"):
        read_torchscript(rewritten(archive, tmp_path / "beyond.pt", "/data.pkl", beyond))


def test_compressed_data_is_refused(archive: Path, tmp_path: Path) -> None:
    good = storage_pickle("I2\nI2\n", "I2\nI1\n")
    packed = rewritten(archive, tmp_path / "packed.pt", "/data.pkl", good, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="is a damaged TorchScript archive"):
        read_clip(packed)


def test_modules_in_a_circle_end(archive: Path, tmp_path: Path) -> None:
    circle = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x04\x00\x00\x00selfh\x00sb."
    with pytest.raises(DataError, match="is a damaged TorchScript archive"):
        read_torchscript(rewritten(archive, tmp_path / "circle.pt", "/data.pkl", circle))


def test_a_tree_without_end_and_tensors_with_a_state_are_refused(archive: Path, tmp_path: Path) -> None:
    """A few bytes can describe 2 to the power of 60 modules; torch's own ``__setstate__`` gives a tensor any size."""
    tree = b"\x80\x02c__torch__\nM\n)\x81q\x00"
    for level in range(60):
        old, new = bytes([level]), bytes([level + 1])
        tree += b"c__torch__\nM\n)\x81}X\x01\x00\x00\x00ah" + old + b"sX\x01\x00\x00\x00bh" + old + b"sbq" + new
    changed = storage_pickle("I2\nI2\n", "I2\nI1\n")
    assert changed.count(b"tRub") == 1
    for number, content in enumerate((tree + b".", changed.replace(b"tRub", b"tR}bub"))):
        with pytest.raises(DataError, match="is a damaged TorchScript archive"):
            read_torchscript(rewritten(archive, tmp_path / f"{number}.pt", "/data.pkl", content))


def test_an_archive_without_a_description_of_modules_is_refused(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "bare.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("/data.pkl"):
                new.writestr(name, old.read(name))
    with pytest.raises(DataError, match="is a damaged TorchScript archive"):
        read_clip(tmp_path / "bare.pt")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_no_finite_numbers_are_told_by_name(
    published: Callable[[str], Path], tmp_path: Path, number: float
) -> None:
    state = load_file(published("safetensors"))
    state["visual.proj"] = state["visual.proj"].double()
    state["visual.proj"][0, 0] = number
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(DataError, match=r"numbers that are not finite \(first: visual_projection\.weight\)"):
        read_clip(tmp_path / "clip.safetensors")


def truncated(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return target


@pytest.mark.parametrize("layout", ["torchscript", "torch", "safetensors"])
def test_truncated_files_are_refused(published: Callable[[str], Path], tmp_path: Path, layout: str) -> None:
    whole = published(layout)
    with pytest.raises(DataError, match=r"damaged|not a readable") as raised:
        read_clip(truncated(whole, tmp_path / f"half{whole.suffix}"))
    assert "Traceback" not in str(raised.value)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    torch.save({"visual.proj": Evil(mark)}, path)
    with pytest.raises(DataError, match="could run code; it was not loaded"):
        read_clip(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 64, "heads": 1}, "width 128; the encoder has width 64"),
        ({"patch": 16}, "patch 8; the encoder has patch 16"),
        ({"depth": 4}, "depth 3; the encoder has depth 4"),
        ({"depth": 4, "dim": 16}, "depth 3, dim 32; the encoder has depth 4, dim 16"),
    ],
)
def test_a_clip_of_another_size_is_told_by_its_sizes(
    published: Callable[[str], Path], sizes: dict[str, int], message: str
) -> None:
    own = {"patch": 8, "width": 128, "depth": 3, "heads": 2, "dim": 32, "feature_blocks": (0, 1, 2)} | sizes
    encoder = ClipEncoder(VitShape(**own), 32)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(DataError, match=f"is a CLIP of another size: {message}"):
        load_clip_weights(encoder, published("safetensors"))
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("layout", ["open_clip", "hugging_face"])
def test_a_description_tells_heads_and_activation(
    published: Callable[[str], Path], encoder: ClipEncoder, layout: str
) -> None:
    folder = published(layout)
    found = read_clip(folder).facts
    assert found == ("quick_gelu", 2, 1)
    description = next(folder.glob("*config.json"))
    text = description.read_text()
    config = json.loads(text)
    if layout == "open_clip":
        config["model_cfg"]["quick_gelu"] = False
    else:
        config["vision_config"]["hidden_act"] = "gelu"
    description.write_text(json.dumps(config))
    with pytest.raises(DataError, match="activation gelu; the encoder has activation quick_gelu"):
        load_clip_weights(encoder, folder)
    for strange in ("[]", "{}", '{"model_cfg": {"vision_cfg": {"width": "wide"}}}', '{"vision_config": 3}'):
        description.write_text(strange)
        assert read_clip(folder).facts.vision_heads is None


def changed(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    state = load_file(path)
    change(state)
    save_file(state, target)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.ln_post.bias"), "1 tensors are missing .*post_layernorm.bias"),
        (
            lambda s: s.update({"visual.ln_last.bias": s.pop("visual.ln_post.bias")}),
            "1 of .* tensors have other names .*visual.ln_last.bias",
        ),
        (lambda s: s.update({"visual.ln_post.bias": torch.zeros(3)}), r"shape \(3,\), not \(128,\)"),
        (lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(3)}), "image encoder is a ResNet"),
        (lambda s: s.update({"visual.positional_embedding": torch.zeros(12, 128)}), "no square grid"),
        (lambda s: [s.pop(n) for n in list(s) if n != "logit_scale"], "is no CLIP of a known layout"),
        (lambda s: [s.update({f"x.{n}": s.pop(n)}) for n in list(s)], "tensors have other names"),
        (lambda s: s.update({"visual.proj": torch.zeros(3)}), r"shape \(3,\)"),
        (lambda s: s.update({"visual.conv1.weight": torch.zeros(3)}), r"shape \(3,\)"),
        (
            lambda s: s.update({"visual.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(2, 3)}),
            "3 tensors are missing .*_proj.weight",
        ),
        (lambda s: s.update({"visual.positional_embedding": torch.tensor(1.0)}), "no square grid"),
    ],
)
def test_files_with_other_tensors_are_refused(
    published: Callable[[str], Path],
    encoder: ClipEncoder,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    path = changed(published("safetensors"), tmp_path / "changed.safetensors", change)
    with pytest.raises(DataError, match=message):
        load_clip_weights(encoder, path)


def test_places_without_a_clip_are_refused(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(DataError, match="is no folder of a CLIP"):
        read_clip(tmp_path)
    with pytest.raises(DataError, match=r"nothing\.pt does not exist"):
        read_clip(tmp_path / "nothing.pt")
    with pytest.raises(PerdureError, match="not a weights file"):
        read_clip(Path(shutil.copy(archive.parent / "bpe_simple_vocab_16e6.txt.gz", tmp_path / "words.gz")))
