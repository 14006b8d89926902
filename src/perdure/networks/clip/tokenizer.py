"""CLIP's byte-pair encoding from local files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from perdure.errors import DataError, UsageError
from perdure.files import read_json, refuse_special

BPE_FILE: Final = "bpe_simple_vocab_16e6.txt.gz"
FOLDER_FILES: Final = ("vocab.json", "merges.txt")
START, END = "<|startoftext|>", "<|endoftext|>"
LARGEST: Final = 1 << 26
"""Bytes of an unpacked file of merges; CLIP's has 3 MB."""


def find_vocabulary(beside: Path) -> Path:
    """The vocabulary that lies beside a file of weights, or in its folder.

    Raises:
        DataError: There is none.
    """
    folder = beside if beside.is_dir() else beside.parent
    if all((folder / file).is_file() for file in FOLDER_FILES):
        return folder
    if (folder / BPE_FILE).is_file():
        return folder / BPE_FILE
    raise DataError(
        f"{folder} holds no vocabulary for CLIP's text encoder",
        f"put {BPE_FILE} of CLIP or open_clip there, or vocab.json and merges.txt of Hugging Face",
    )


def load_tokenizer(path: Path, size: int) -> Any:
    """CLIP's tokenizer.

    Args:
        path: ``bpe_simple_vocab_16e6.txt.gz``, or a folder with ``vocab.json`` and ``merges.txt``.
        size: Tokens that the text encoder knows; the tokenizer must have as many. Checked because transformers makes
            a tokenizer of two tokens, without a word, where files are missing.

    Returns:
        A ``transformers.CLIPTokenizer``.

    Raises:
        DataError: The files are missing, damaged, or of another vocabulary.
        UsageError: transformers is not installed.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError as error:
        raise UsageError("CLIP's tokenizer needs the package transformers", "pip install 'perdure[clip]'") from error
    if path.is_dir():
        vocabulary = read_json(path / FOLDER_FILES[0])
        merges = _merges(_lines(path / FOLDER_FILES[1]))
    else:
        merges = _merges(_lines(path))[
            : max(0, size - 2 * 256 - 2)
        ]  # the file goes on with merges that CLIP leaves out
        vocabulary = _vocabulary(merges)
    numbers: list[object] = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if not all(isinstance(number, int) for number in numbers) or set(numbers) != set(range(len(numbers))):
        raise DataError(f"{path} is no vocabulary of CLIP: tokens are not numbered from 0", "fetch it again")
    ends = [vocabulary.get(token) for token in (START, END)]
    if len(vocabulary) != size or ends != [size - 2, size - 1]:
        raise DataError(
            f"{path} is another vocabulary than the text encoder's: {len(vocabulary)} tokens, not {size}",
            f"use the one that was published with the weights (49408 tokens for {BPE_FILE})",
        )
    try:
        return CLIPTokenizer(vocab=vocabulary, merges=merges)
    except Exception as error:  # the Rust library raises bare exceptions
        raise DataError(f"{path} is no vocabulary of CLIP: {error}", "fetch it again") from error


def _lines(path: Path) -> list[str]:
    refuse_special(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError("it is too large")
        return content.decode("utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "give the vocabulary that belongs to the weights") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is no list of merges: {error}", "fetch it again") from error


def _merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs to merge, the most frequent first; a first line that tells the version is left out."""
    pairs = (line.split() for line in lines if not line.startswith(("#version", '"bpe_simple_vocab')))
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _vocabulary(merges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Token -> number: bytes, bytes that end a word, merged pairs, the two marks (OpenAI's order)."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def _byte_symbols() -> list[str]:
    """A printable character per byte (GPT-2's table): printable bytes stand for themselves and come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]
