"""How published CLIPs are laid out: folders, their descriptions, and names of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor

from perdure.errors import DataError
from perdure.files import read_json

FOLDERS: Final = (
    ("config.json", ("model.safetensors", "pytorch_model.bin")),
    ("open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
)
"""Folders of Hugging Face and of open_clip: the description, and the weights, the safer format first."""
PARTS: Final = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
)
"""OpenAI's names, which open_clip shares, and transformers'."""
BLOCK_PARTS: Final = (
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
PACKED = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")
PROJECTIONS: Final = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


class Facts(NamedTuple):
    """What a folder's description says that tensors do not tell; ``None`` where it does not.

    Args:
        activation: ``quick_gelu`` or ``gelu``.
        vision_heads: Attention heads of the image encoder.
        text_heads: Attention heads of the text encoder.
    """

    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None


def in_folder(folder: Path) -> tuple[Path, Facts]:
    """The file with the weights in a folder, and what its description tells. Raises DataError for another folder."""
    for description, files in FOLDERS:
        there = [folder / file for file in files if (folder / file).is_file()]
        if (folder / description).is_file() and there:
            config = read_json(folder / description)
            return there[0], _facts(config if isinstance(config, dict) else {})
    raise DataError(
        f"{folder} is no folder of a CLIP",
        "it must hold config.json and model.safetensors (Hugging Face), or open_clip_config.json and its weights",
    )


def _facts(config: Mapping[str, Any]) -> Facts:
    """Facts of either kind of description."""
    model = config.get("model_cfg")
    if isinstance(model, dict):
        vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
        width, head_width = _number(vision, "width"), _number(vision, "head_width") or 64
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
        return Facts(activation, width and max(1, width // head_width), _number(text, "heads"))
    vision = config if config.get("model_type") == "clip_vision_model" else _section(config, "vision_config")
    text = _section(config, "text_config")
    named = str(vision["hidden_act"]) if "hidden_act" in vision else None
    return Facts(named, _number(vision, "num_attention_heads"), _number(text, "num_attention_heads"))


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None


def from_openai(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Tensors with OpenAI's names, under transformers' names; packed projections are taken apart.

    Raises:
        DataError: The image encoder is no vision transformer.
    """
    if any(name.startswith("visual.layer1.") for name in tensors):
        raise DataError(
            f"{path} is a CLIP whose image encoder is a ResNet", "use one with a vision transformer, such as ViT-B/16"
        )
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in PROJECTIONS:
            renamed[PROJECTIONS[name]] = tensor.mT.contiguous() if tensor.ndim == 2 else tensor
            continue
        new = next((part + name.removeprefix(old) for old, part in PARTS if name.startswith(old)), name)
        packed = PACKED.fullmatch(new)
        if packed and tensor.ndim and len(tensor) % 3 == 0:  # else it is told later, as a name that is not expected
            block, kind = packed.groups()
            thirds = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            renamed |= {f"{block}.self_attn.{part}.{kind}": third.contiguous() for part, third in thirds}
            continue
        for old, part in BLOCK_PARTS:
            new = new.replace(old, part)
        renamed[new] = tensor
    return renamed
