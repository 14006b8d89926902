"""The text table: one vector per class name, made once and then data (spec CLIP-CISS 2.2)."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perdure.errors import DataError, PerdureError, UsageError, plain
from perdure.files import cache_dir, read_tensors, sha256, write_tensors
from perdure.networks.clip.layouts import Facts
from perdure.networks.clip.names import TEMPLATE, check_names, names_hash, prompts
from perdure.networks.clip.tokenizer import FOLDER_FILES, find_vocabulary, load_tokenizer
from perdure.networks.clip.weights import ClipFile, described, read_clip, text_model, weights_file
from perdure.networks.weights import Weights

HASH: Final = "hash"
SHARED: Final = 0.75
"""Share of the common direction in stand-in vectors: CLIP's table of ADE20K has a mean cosine of 0.76."""
GRAMS: Final = (2, 3, 4)
BATCH: Final = 64
VERSION: Final = "2"  # increase it when the same key gives another table


@dataclass(frozen=True)
class TextTable:
    """Vectors of class names, and what they were made from.

    Args:
        names: In the order of the rows.
        vectors: ``(N, D)`` float32, each of length 1.
        templates: Prompts that the names stood in; empty for the stand-in.
        weights: Of the text encoder; the source ``hash`` is the stand-in.
        reader: Hash of everything besides names and prompts that the vectors depend on: weights, what their
            description tells, vocabulary. Zero for the stand-in.
    """

    names: tuple[str, ...]
    vectors: Tensor
    templates: tuple[str, ...]
    weights: Weights
    reader: str = "00" * 32

    @property
    def names_sha256(self) -> str:
        """Hash of the names in their order."""
        return names_hash(self.names)


def text_table(
    names: Sequence[str],
    encoder: str | Path,
    *,
    dim: int,
    templates: Sequence[str] = (TEMPLATE,),
    vocabulary: Path | None = None,
) -> TextTable:
    """Make the text table of class names, or read it from the cache.

    Args:
        names: One per class, in learning order: rows have their order.
        encoder: ``hash`` for :func:`hash_vectors`, or the path of a CLIP's weights, see
            :func:`~perdure.networks.clip.weights.read_clip`.
        dim: Length of the rows that the network takes.
        templates: Prompts with ``{}`` for the name; of several, the mean of the vectors is taken.
        vocabulary: Of the tokenizer, see :func:`~perdure.networks.clip.tokenizer.load_tokenizer`; looked for beside the
            weights if not given.

    Raises:
        UsageError: A name is empty, occurs twice or is too long, or a template has no place for it.
        DataError: The weights or the vocabulary cannot be used, or give vectors of another length than ``dim``.
    """
    check_names(names)
    if str(encoder) == HASH:
        return TextTable(tuple(names), hash_vectors(names, dim), (), Weights(HASH))
    words = [prompts(name, templates) for name in names]
    path = Path(encoder).expanduser()
    file = weights_file(path)
    tokens = vocabulary.expanduser() if vocabulary is not None else find_vocabulary(path)
    weights = Weights(str(path), sha256(file))
    reader = _reader(weights, described(path), tokens)
    key = _key(words, reader)
    vectors = _cached(key, len(names))
    if vectors is None:
        vectors = _encode(words, read_clip(path), tokens)
        with contextlib.suppress(PerdureError):  # a cache that cannot be written costs time only
            write_tensors(_place(key), {"vectors": vectors})
    if vectors.shape[1] != dim:
        raise DataError(
            f"{path} gives text vectors of length {vectors.shape[1]}, the network takes {dim}",
            "use the text encoder of the CLIP that the network's encoder has the sizes of",
        )
    return TextTable(tuple(names), vectors, tuple(templates), weights, reader)


def hash_vectors(names: Sequence[str], dim: int) -> Tensor:
    """Stand-in for CLIP's text vectors where there are no weights: ``(N, dim)`` float32, each of length 1.

    NOT faithful: it knows nothing of meaning or of images. A name's pieces of 2 to 4 letters and its words are each a
    fixed random ±1 vector (bits of SHAKE-256, so the same on every machine), their sum is the name's own direction; a
    direction that all names share is added, so that cosines between names spread about 0.75 as those of CLIP do.
    Names with common letters are alike, names with a common meaning are not. What it serves for: queries that tell
    classes apart.
    """
    shared = _signs("", dim) / dim**0.5
    own = np.zeros((len(names), dim))
    for row, name in zip(own, names, strict=True):
        row += np.sum([_signs(piece, dim) for piece in _pieces(name)], axis=0)
    own -= (own @ shared)[:, None] * shared  # orthogonal to the shared direction, so that the share is exact
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    return torch.from_numpy(SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own).float()


def _signs(piece: str, dim: int) -> npt.NDArray[np.float64]:
    """A random vector of ±1 that follows from the piece alone."""
    bits = hashlib.shake_256(piece.encode()).digest(-(-dim // 8))
    return np.unpackbits(np.frombuffer(bits, np.uint8))[:dim] * np.float64(2) - 1


def _pieces(name: str) -> list[str]:
    """Words, and their runs of letters with the words' ends marked."""
    words = [f"<{word}>" for word in name.lower().split()]
    grams = [word[i : i + n] for word in words for n in GRAMS for i in range(len(word) - n + 1)]
    return words + grams


@torch.no_grad()
def _encode(words: Sequence[Sequence[str]], found: ClipFile, vocabulary: Path) -> Tensor:
    """Mean over the prompts of each name, ``(N, D)``, each row of length 1."""
    model: Any = text_model(found)
    known = model.config.vocab_size
    tokenizer = load_tokenizer(vocabulary, known)
    lines = [prompt for name in words for prompt in name]
    tokens = [torch.tensor(ids) for ids in tokenizer(lines).input_ids]
    longest = model.config.max_position_embeddings
    for line, ids in zip(lines, tokens, strict=True):
        if len(ids) > longest:
            raise UsageError(
                f"'{plain(line)}' has {len(ids)} tokens, CLIP reads {longest}", "give the class a shorter name"
            )
    # What stands behind the first end mark is never looked at: attention only goes back.
    batches = (pad_sequence(tokens[i : i + BATCH], True, known - 1) for i in range(0, len(tokens), BATCH))
    vectors = torch.cat([F.normalize(model(input_ids=batch).text_embeds, dim=-1) for batch in batches])
    return F.normalize(vectors.reshape(len(words), -1, vectors.shape[1]).mean(1), dim=-1)


def _reader(weights: Weights, facts: Facts, vocabulary: Path) -> str:
    """Hash of what turns prompts into vectors."""
    files = [vocabulary / file for file in FOLDER_FILES] if vocabulary.is_dir() else [vocabulary]
    read = [sha256(file) for file in files if file.is_file()]
    return _digest([VERSION, weights.sha256, facts, read])


def _key(words: Sequence[Sequence[str]], reader: str) -> str:
    """Name of a table in the cache: everything that it depends on."""
    return _digest([words, reader])[:32]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _place(key: str) -> Path:
    return cache_dir() / "text" / f"{key}.safetensors"


def _cached(key: str, rows: int) -> Tensor | None:
    """The table of a key, if it is in the cache and whole."""
    with contextlib.suppress(DataError):
        vectors = read_tensors(_place(key), ["vectors"])["vectors"]
        if vectors.ndim == 2 and len(vectors) == rows:
            return vectors
    return None
