"""Prompts as embeddings: of a CLIP text encoder in a local folder, or of a stand-in that needs no weights.

Both are frozen, and each prompt is encoded once. Nothing is fetched.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from perdure.errors import DataError, UsageError
from perdure.networks.joint_diffusion.extra import need
from perdure.seeds import derive_seed

TOKENS = 77
"""Positions of a prompt, padding included, as CLIP has them."""


def hash_embeddings(prompts: Sequence[str], width: int, tokens: int = TOKENS) -> Tensor:
    """A stand-in without weights: ``(n, tokens, width)`` float32, Gaussian with a seed made from the prompt.

    Equal prompts have equal embeddings, and two that differ in a letter have nothing in common. The scale is that after
    a layer normalisation. Not what the paper uses: prompts that mean much the same are not alike.
    """
    rows = [
        torch.randn(tokens, width, generator=torch.Generator().manual_seed(derive_seed("prompt", prompt)))
        for prompt in prompts
    ]
    return F.layer_norm(torch.stack(rows), (width,))


def clip_embeddings(prompts: Sequence[str], folder: Path, width: int) -> Tensor:
    """Last hidden states of a CLIP text encoder, ``(n, 77, width)`` float32.

    No attention mask is given, so that padding takes part, as published.

    Args:
        prompts: The texts.
        folder: As the transformers library saves one: ``config.json``, ``model.safetensors`` and the tokenizer's
            ``vocab.json`` and ``merges.txt``, together or in ``text_encoder`` and ``tokenizer`` as Stable Diffusion has
            them.
        width: Hidden size that is expected.

    Raises:
        DataError: A file is missing or damaged.
        UsageError: The encoder has another width, or transformers is not installed.
    """
    transformers = need("transformers")
    weights, words = (folder / name for name in ("text_encoder", "tokenizer"))
    weights, words = (weights, words) if weights.is_dir() else (folder, folder)
    for file in (weights / "config.json", weights / "model.safetensors", words / "vocab.json", words / "merges.txt"):
        if not file.is_file():
            raise DataError(f"{file} does not exist", "give the folder of a CLIP text encoder with safetensors")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the library shows a progress bar
            encoder = transformers.CLIPTextModel.from_pretrained(
                weights, local_files_only=True, use_safetensors=True
            ).eval()
            tokenizer = transformers.CLIPTokenizer.from_pretrained(words, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} holds no readable CLIP text encoder: {error}") from error
    config = encoder.config
    if config.hidden_size != width:
        raise UsageError(
            f"the text encoder in {folder} has width {config.hidden_size}, the generator expects {width}",
            f"set method.generator.text_width={config.hidden_size}",
        )
    if len(tokenizer) != config.vocab_size:  # the library makes a tokenizer of two tokens where it finds no files
        raise DataError(
            f"the tokenizer in {words} has {len(tokenizer)} tokens, the encoder {config.vocab_size}",
            "give both files of the same model",
        )
    return _encoded(encoder, tokenizer, prompts)


@torch.no_grad()
def _encoded(encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    length = encoder.config.max_position_embeddings
    ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    hidden: Tensor = encoder(ids.input_ids).last_hidden_state
    return hidden.float()
