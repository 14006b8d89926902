"""A small CLIP in OpenAI's layout, with a forward pass of its own, and its files in every published layout."""

from __future__ import annotations

import gzip
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("transformers")

from perdure.networks.clip.encoder import ClipEncoder, VitShape
from perdure.networks.clip.layouts import from_openai

SHAPE = VitShape(patch=8, width=128, depth=3, heads=2, dim=32, feature_blocks=(0, 1, 2))
SIDE = 32
MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
VOCABULARY = 2 * 256 + len(MERGES) + 2
CONTEXT = 20


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1 = nn.LayerNorm(width)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGelu()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ln_2 = nn.LayerNorm(width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)  # OpenAI's blocks have the tokens first
        mask = torch.full((n, n), float("-inf")).triu(1) if self.causal else None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, causal) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x.transpose(0, 1)).transpose(0, 1)


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, cells = SHAPE.width, (SIDE // SHAPE.patch) ** 2
        self.conv1 = nn.Conv2d(3, width, SHAPE.patch, SHAPE.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, SHAPE.depth, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, SHAPE.dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class TinyClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.visual = Visual()
        self.transformer = Transformer(width, 2, causal=True)
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, SHAPE.dim))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, tokens: Tensor) -> Tensor:
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]])
        return self.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(1)] @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(images), self.encode_text(tokens)


@pytest.fixture(scope="session")
def clip() -> TinyClip:
    torch.manual_seed(11)
    model = TinyClip()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases with values that a mix-up would show
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


@pytest.fixture(scope="session")
def archive(clip: TinyClip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as OpenAI publishes it: a TorchScript archive. Copy it before you change it."""
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    example = (torch.randn(1, 3, SIDE, SIDE), torch.tensor([[3, VOCABULARY - 1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(clip, example)
    torch.jit.save(traced, str(path))
    write_bpe(path.parent)
    return path


def write_bpe(folder: Path) -> Path:
    """The vocabulary as OpenAI publishes it: more merges than CLIP takes."""
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *map(" ".join, MERGES), "x y", "y z"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture
def published(clip: TinyClip, archive: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Call it with the name of a layout: writes the model that way and returns what a recipe would name."""

    def write(layout: str) -> Path:
        state = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
        if layout == "torchscript":
            return archive
        if layout == "torch":
            torch.save(state | {"input_resolution": torch.tensor(SIDE)}, tmp_path / "clip.pt")
            return tmp_path / "clip.pt"
        if layout == "safetensors":
            save_file(state, tmp_path / "clip.safetensors")
            return tmp_path / "clip.safetensors"
        folder = tmp_path / layout
        folder.mkdir()
        if layout == "open_clip":
            model = {
                "embed_dim": SHAPE.dim,
                "quick_gelu": True,
                "vision_cfg": {"width": SHAPE.width, "layers": SHAPE.depth, "patch_size": SHAPE.patch},
                "text_cfg": {"width": 64, "heads": 1, "layers": 2},
            }
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
            save_file(state, folder / "open_clip_model.safetensors")
            write_bpe(folder)
        else:
            from transformers import CLIPConfig, CLIPModel

            vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
            text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
            vision |= {"patch_size": 8, "image_size": SIDE}
            text |= {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": VOCABULARY - 1}
            model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHAPE.dim))
            scale = state.pop("logit_scale")
            model.load_state_dict(from_openai(state, folder) | {"logit_scale": scale}, strict=True)
            model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def encoder() -> ClipEncoder:
    """Of the small model's size, with the class embedding added once as in CLIP."""
    torch.manual_seed(1)
    return ClipEncoder(SHAPE, SIDE, double_class_embedding=False)
