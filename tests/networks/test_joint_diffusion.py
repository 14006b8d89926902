"""The joint diffusion network, its noise, its samplers, and embedded prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from perdure.errors import DataError, UsageError
from perdure.networks.joint_diffusion.network import Adapter, JointDiffusion
from perdure.networks.joint_diffusion.noise import add_noise, kept_signal, scheduler
from perdure.networks.joint_diffusion.text import clip_embeddings, hash_embeddings
from perdure.networks.unit_unet import unit_unet

pytest.importorskip("diffusers")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.golden
@pytest.mark.parametrize(("width", "unet", "adapter"), [(768, 182_352_900, 591_744), (1024, 185_891_844, 1_051_136)])
def test_published_numbers_of_parameters(width: int, unet: int, adapter: int) -> None:
    with torch.device("meta"):
        network = JointDiffusion(3, width)
    assert count(network.unet) == unet
    assert count(Adapter(width)) == adapter
    zero = [
        name for name, _ in network.unet.named_parameters() if name.split(".")[-2] in ("conv2", "proj_out", "conv_out")
    ]
    assert len(zero) == 98
    heads = [part.heads for name, part in network.unet.named_modules() if name.endswith("attn1")]
    assert sorted(set(heads)) == [4, 8]  # the library's option holds the number of heads, not their width


@pytest.mark.golden
@pytest.mark.parametrize(("classes", "parameters"), [(4, 8_541_364), (6, 8_541_430), (7, 8_541_463)])
def test_published_numbers_of_the_segmenter(classes: int, parameters: int) -> None:
    network = unit_unet(3)
    network.grow(classes)
    assert count(network.body) == 8_541_232
    assert count(network) == parameters


def test_segmenter_at_its_smallest_size() -> None:
    network = unit_unet(1, (2, 4, 4))
    assert network.multiple == (4, 4)
    assert network.features(torch.randn(1, 1, 8, 12)).shape == (1, 2, 8, 12)
    with pytest.raises(UsageError, match="use images of 8 pixels"):
        network.features(torch.randn(1, 1, 4, 4))
    with pytest.raises(UsageError, match="cannot be built"):
        unit_unet(1, (4,))


def small() -> JointDiffusion:
    torch.manual_seed(0)
    return JointDiffusion(1, 8, size="smoke")


def test_a_fresh_network_answers_zero_and_the_loss_reaches_every_weight_once_it_moved() -> None:
    network = small()
    network.add_adapter()
    pairs, times, text, tasks = torch.randn(2, 2, 8, 8), torch.tensor([3, 900]), torch.randn(2, 4, 8), torch.zeros(2)
    out = network(pairs, times, text, tasks.long())
    assert out.shape == pairs.shape and not out.any()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network(pairs, times, text, tasks.long()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert {name: len(parts) for name, parts in network.parameter_groups().items()} == {
        "unet": len(list(network.unet.parameters())),
        "adapters": 4,
        "gammas": 1,
    }


def test_an_adapter_sees_prompts_of_its_own_task_only() -> None:
    network = small()
    for _ in range(3):
        network.add_adapter(gamma=0.5)
    text = torch.randn(4, 3, 8)
    adapted = network.adapted(text, torch.tensor([0, 2, 0, 2]))
    adapted.square().sum().backward()
    assert all(p.grad is None for p in network.adapters[1].parameters())
    assert torch.equal(adapted[1], network.adapters[2](text[1]))
    assert not torch.equal(adapted[0], network.adapters[2](text[0]))
    with torch.no_grad():  # at first an adapter changes next to nothing
        fresh = Adapter(8)(text)
    assert 0 < (fresh - text).norm() / text.norm() < 1e-3


def test_sides_must_halve_from_level_to_level() -> None:
    small().check_size((8, 6))
    with pytest.raises(UsageError, match="8×7: sides must be multiples of 2"):
        small().check_size((8, 7))


@pytest.mark.golden
def test_noise_schedule_and_published_sampling_steps() -> None:
    expected = {
        0: 0.998500,
        100: 0.821773,
        250: 0.502132,
        500: 0.107677,
        750: 6.95167e-3,
        990: 1.16642e-4,
        999: 9.69109e-5,
    }
    for time, share in expected.items():
        assert float(kept_signal()[time]) == pytest.approx(share, rel=1e-5)
    ddim = scheduler("ddim", 100)
    assert ddim.timesteps.tolist() == list(range(990, -1, -10))
    assert torch.allclose(ddim.alphas_cumprod, kept_signal(), rtol=1e-5)
    assert len(scheduler("dpm", 20).timesteps) == 20
    clean, noise, times = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4), torch.tensor([0, 999])
    assert torch.allclose(add_noise(clean, noise, times), ddim.add_noise(clean, noise, times), atol=1e-6)


def test_hash_embeddings_depend_on_the_prompt_alone() -> None:
    one = hash_embeddings(["a", "b"], 8, 5)
    assert one.shape == (2, 5, 8)
    assert torch.equal(one[1], hash_embeddings(["b"], 8, 5)[0])
    assert not torch.allclose(one[0], one[1])
    assert torch.allclose(one.square().mean(2), torch.ones(2, 5), atol=1e-3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder with its tokenizer, as files."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    torch.manual_seed(0)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_clip_embeddings_come_from_files_and_padding_takes_part(clip_folder: Path) -> None:
    made = clip_embeddings(["a left ventricle", "a prostate"], clip_folder, 16)
    assert made.shape == (2, 77, 16) and made.isfinite().all()
    assert made[0, -1].any() and not torch.allclose(made[0, -1], made[1, -1])
    assert torch.equal(made, clip_embeddings(["a left ventricle", "a prostate"], clip_folder, 16))


def test_a_folder_that_holds_no_fitting_encoder(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"set method\.generator\.text_width=16") as told:
        clip_embeddings(["a"], clip_folder, 768)
    assert "has width 16" in str(told.value)
    with pytest.raises(DataError, match=r"config.json does not exist"):
        clip_embeddings(["a"], tmp_path, 16)
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    with pytest.raises(DataError, match="2 tokens, the encoder 54"):
        clip_embeddings(["a"], tmp_path, 16)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="no readable CLIP text encoder"):
        clip_embeddings(["a"], tmp_path, 16)
