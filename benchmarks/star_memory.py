"""Peak memory of STAR's replay term, forward and backward, in chunks and all at once.

    python benchmarks/star_memory.py [--vectors 200000] [--classes 5] [--device cuda] [--json FILE]

Each way runs in its own process; reported is the peak above what the process held before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.methods.losses import negative_bce
from perdure.methods.star.replay import chunks, draw
from perdure.methods.star.terms import replay_bce

WIDTH, OLD = 256, 15


def replay(way: str, vectors: int, classes: int, device: str) -> tuple[float, float]:
    """Peak MiB and seconds of one forward and backward pass; ``way`` is a chunk size or ``all at once``."""
    torch.manual_seed(0)
    weight = torch.randn(classes, WIDTH, device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    prototypes = F.normalize(torch.rand(OLD, WIDTH, device=device), dim=1)
    spreads, norms = 0.03 * torch.rand(OLD, WIDTH, device=device), torch.rand(OLD, 2, device=device)

    def loss(number: int) -> Tensor:
        numbers = torch.full((OLD,), number // OLD, device=device)
        if way != "all at once":
            return replay_bce(chunks(prototypes, spreads, norms, numbers, int(way)), weight, bias)
        x = draw(prototypes, spreads, norms, torch.repeat_interleave(numbers))
        return negative_bce(F.linear(x, weight, bias).t()[None])

    loss(1000).sum().backward()  # libraries load and allocate on first use
    before = held(device)
    start = time.perf_counter()
    loss(vectors).sum().backward()
    peak = held(device) - before
    return peak / 2**20, time.perf_counter() - start


def held(device: str) -> int:
    """Peak bytes so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=5, help="new classes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{arguments.vectors:,} vectors of {WIDTH} channels, {arguments.classes} new classes")
    print(f"{'chunk':<14}{'peak [MiB]':>12}{'time [ms]':>12}")
    context = multiprocessing.get_context("spawn")
    for way in ["all at once", "65536", "16384", "4096"]:
        with context.Pool(1) as pool:
            peak, seconds = pool.apply(replay, (way, arguments.vectors, arguments.classes, arguments.device))
        rows.append({"chunk": way, "peak_mib": peak, "seconds": seconds})
        print(f"{way:<14}{peak:>12.1f}{1e3 * seconds:>12.1f}")
    if arguments.json:
        about = {"torch": torch.__version__, "device": arguments.device, "vectors": arguments.vectors}
        arguments.json.write_text(json.dumps(about | {"ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
