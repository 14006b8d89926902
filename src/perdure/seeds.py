"""Randomness without hidden state.

Every random draw of a run is a function of where it happens: ``fold(run seed, task, phase, step)``. A run that
was killed therefore needs no saved generator state, and the same sample gets the same augmentation in one
process and in eight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def fold(*parts: int | str) -> int:
    """Hash integers and names into one seed in [0, 2**63). The same parts give the same seed on any machine."""
    text = "\x1f".join(f"{type(p).__name__[0]}{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own torch seed and leave the CPU generator outside as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
