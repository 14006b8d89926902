"""CLIP weights from a file or folder in any published layout. Loading is strict, and no code in a file is run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perdure.errors import DataError, UsageError
from perdure.files import refuse_special, sha256
from perdure.networks.clip.encoder import ClipEncoder, resize_positions
from perdure.networks.clip.layouts import Facts, from_openai, in_folder
from perdure.networks.clip.torchscript import is_torchscript, read_torchscript
from perdure.networks.weights import Weights, read_weight_file

VISION = ("vision_model.", "visual_projection.")
TEXT = ("text_model.", "text_projection.")
NO_WEIGHTS = re.compile(r"logit_scale|logit_bias|input_resolution|context_length|vocab_size|attn_mask|.*position_ids")
"""What files hold besides the two networks."""
POSITIONS = "vision_model.embeddings.position_embedding.weight"
PATCHES = "vision_model.embeddings.patch_embedding.weight"
VISUAL_PROJECTION = "visual_projection.weight"


class ClipFile(NamedTuple):
    """A published CLIP, read.

    Args:
        path: The file with the weights.
        tensors: By transformers' names, float32.
        facts: From the description beside it.
        sha256: Of the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: Facts
    sha256: str


def load_clip_weights(encoder: ClipEncoder, path: Path) -> Weights:
    """Fill an image encoder; nothing changes unless everything fits. The position table is resized to its grid.

    Args:
        encoder: Image encoder.
        path: See :func:`read_clip`.

    Raises:
        DataError: The file is missing, damaged, holds code, is no CLIP, or is one of another size.
    """
    found = read_clip(path)
    own = encoder.state_dict()
    tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith(VISION)}
    _check_size(found, encoder)
    if POSITIONS in tensors:
        grid = round((len(own[POSITIONS]) - 1) ** 0.5)
        tensors[POSITIONS] = resize_positions(_square(tensors[POSITIONS], found.path), (grid, grid))
    if PATCHES in tensors and tensors[PATCHES].ndim == 4 and tensors[PATCHES].shape[1] != own[PATCHES].shape[1]:
        from timm.models import adapt_input_conv

        tensors[PATCHES] = adapt_input_conv(own[PATCHES].shape[1], tensors[PATCHES])
    encoder.load_state_dict(strictly(tensors, own, found.path), strict=True)
    return Weights(str(path), found.sha256)


def weights_file(path: Path) -> Path:
    """The file with the weights of :func:`read_clip`'s ``path``. Raises DataError where there is none."""
    file = in_folder(path)[0] if path.is_dir() else path
    if not file.is_file():
        refuse_special(file)
        raise DataError(f"weights file {file} does not exist", "check the path; 'random' needs no file")
    return file


def described(path: Path) -> Facts:
    """What the description beside :func:`read_clip`'s ``path`` tells; nothing of a file."""
    return in_folder(path)[1] if path.is_dir() else Facts()


def read_clip(path: Path) -> ClipFile:
    """Read a published CLIP.

    Args:
        path: A file: OpenAI's TorchScript archive, safetensors, or a torch file with nothing but tensors; with the
            names of OpenAI (as open_clip's) or of transformers. Or a folder of Hugging Face (``config.json``) or of
            open_clip (``open_clip_config.json``).

    Raises:
        DataError: It is missing, damaged, holds code, or is no CLIP with a vision transformer.
    """
    path = path.expanduser()
    file = weights_file(path)
    facts = described(path)
    raw = read_torchscript(file) if is_torchscript(file) else read_weight_file(file)
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in raw.items()
        if not NO_WEIGHTS.fullmatch(name)
    }
    if any(name.startswith("visual.") for name in tensors):
        tensors = from_openai(tensors, file)
    strange = [name for name in tensors if not name.startswith((*VISION, *TEXT))]
    if strange or not tensors:
        raise DataError(
            f"{file} is no CLIP of a known layout"
            + (f": {len(strange)} of {len(tensors)} tensors have other names (first: {strange[0]})" if strange else ""),
            "give OpenAI's ViT-B-16.pt, open_clip's safetensors, or a folder of a CLIP from Hugging Face",
        )
    if odd := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise DataError(f"{file} holds numbers that are not finite (first: {odd})", "fetch it again")
    return ClipFile(file, tensors, facts, sha256(file))


def strictly(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``found``, if its names and shapes are those of ``expected``.

    Raises:
        DataError: They are not; says how many names differ and the first, or which shape does.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        close = difflib.get_close_matches(missing[0], unexpected, n=1, cutoff=0.8) if missing else []
        counts = [
            f"{len(names)} tensors are {what} (first: {names[0]})"
            for names, what in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise DataError(
            f"{path} does not fit: {', '.join(counts)}",
            f"the file has '{close[0]}' where '{missing[0]}' is expected" if close else "is the CLIP whole?",
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise DataError(
                f"{path} does not fit: {name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}",
                "check that the sizes of the encoder are those of the file",
            )
    return dict(found)


def depth(names: Iterable[str], part: str) -> int:
    """Number of blocks of ``vision_model`` or ``text_model`` among the names of tensors."""
    found = (re.match(rf"{part}\.encoder\.layers\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _check_size(found: ClipFile, encoder: ClipEncoder) -> None:
    """Raise DataError for a CLIP of other sizes than the encoder's; what is missing is told later, by name."""
    tensors, shape = found.tensors, encoder.shape
    patches, projection = tensors.get(PATCHES), tensors.get(VISUAL_PROJECTION)
    if patches is None or projection is None or patches.ndim != 4 or projection.ndim != 2:
        return
    width, _, patch, _ = patches.shape
    dim = len(projection)
    sizes = [
        ("width", width, shape.width),
        ("patch", patch, shape.patch),
        ("depth", depth(tensors, "vision_model"), shape.depth),
        ("dim", dim, shape.dim),
        ("heads", found.facts.vision_heads or shape.heads, shape.heads),
        ("activation", found.facts.activation or shape.activation, shape.activation),
    ]
    if any(there != here for _, there, here in sizes):
        there, here = (", ".join(f"{size[0]} {size[k]}" for size in sizes if size[1] != size[2]) for k in (1, 2))
        raise DataError(
            f"{found.path} is a CLIP of another size: {there}; the encoder has {here}",
            "use weights of the encoder's size (OpenAI's ViT-B/16 for vit_b16), or give network.encoder these sizes",
        )


def _square(table: Tensor, path: Path) -> Tensor:
    side = round(max(table.shape[0] - 1, 0) ** 0.5) if table.ndim == 2 else 0
    if not side or side * side + 1 != table.shape[0]:
        raise DataError(
            f"{path} has a position table of shape {tuple(table.shape)}, which is no square grid and a class token",
            "is it a CLIP with a vision transformer?",
        )
    return table


def text_model(found: ClipFile) -> nn.Module:
    """Transformers' text encoder with the weights of a file, in evaluation mode; its sizes follow from the tensors.

    Raises:
        DataError: The file has no text encoder, or a damaged one.
        UsageError: transformers is not installed.
    """
    try:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    except ImportError as error:
        raise UsageError("CLIP's text encoder needs the package transformers", "pip install 'perdure[clip]'") from error
    tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith(TEXT)}
    layers = depth(tensors, "text_model")
    names = ("embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1")
    sizes = [tensors.get(f"text_model.{name}.weight") for name in names]
    projection = tensors.get("text_projection.weight")
    whole = all(size is not None and size.ndim == 2 and size.numel() for size in (*sizes, projection))
    if projection is None or not whole or layers > len(tensors):
        raise DataError(
            f"{found.path} holds no text encoder",
            "use the whole CLIP, not its image encoder alone, or text encoder hash",
        )
    (vocabulary, width), (context, _), (hidden, _) = (size.shape for size in sizes if size is not None)
    heads = found.facts.text_heads or max(1, width // 64)  # OpenAI's rule where no description says otherwise
    if width % heads:
        raise DataError(f"{found.path} has a text encoder of width {width}, which {heads} heads do not divide")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        projection_dim=len(projection),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        hidden_act=found.facts.activation or "quick_gelu",
        # in all of CLIP's vocabularies these are the last two
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    with torch.random.fork_rng(devices=[]):  # or a run would differ by whether its text table was in the cache
        model: nn.Module = CLIPTextModelWithProjection(config)
    model.load_state_dict(strictly(tensors, model.state_dict(), found.path), strict=True)
    return model.eval().requires_grad_(False)
