"""Random seeds without hidden state.

Every random draw of a run has a seed of its own: ``derive_seed(run seed, task, phase, step)``. A resumed run therefore
needs no saved generator state, and a sample gets the same augmentation for any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(*parts: int | str) -> int:
    """Hash integers and names to one seed in [0, 2**63). The same parts give the same seed on any machine."""
    text = "\x1f".join(f"{type(p).__name__[0]}{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def manual_seed(seed: int) -> None:
    """Seed torch on the CPU and on every GPU in use.

    ``torch.manual_seed`` does the same. But while CUDA is not initialised, it formats a stack trace at each call, which
    takes longer than a step of a small network.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for a block, and restore its state afterwards."""
    import torch

    outside = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(outside)
