"""Generated pairs as memory: size and time of a resume save and of sealing, in buffers against files.

    python benchmarks/kept_files.py [--pairs 3000] [--side 128] [--folder DIR] [--json FILE]

A pair is an image of 3 channels in float32 and a label of 4 bytes per pixel. Both methods have a network of the same
size, which changes between the tasks; the memory does not. Times contain the flush to the disk of DIR. One thread, as
in a process that reads samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from perdure.data.tensors import FileSamples
from perdure.engine.checkpoint import Checkpoint, Position
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.state import Stateful
from perdure.kept.items import Kept
from perdure.kept.ledger import task_folder, write_ledger
from perdure.kept.method_state import write_kept
from perdure.kept.store import FileStore, item_names

Figures = dict[str, float]


class Memory(Stateful):
    """A small network, and pairs in buffers or files."""

    def __init__(self, store: FileStore) -> None:
        super().__init__()
        self.network = nn.Linear(512, 512)
        self.store = store
        self.item = Kept("pairs", "synthetic", (), "noise", files="pairs")

    def keep(self, count: int, pair: Callable[[int], dict[str, Tensor]], in_files: bool) -> None:
        """Make the pairs and keep them."""
        if in_files:
            self.files["pairs"] = item_names(0, 0, "pairs", count)
            for index, name in enumerate(self.files["pairs"]):
                self.store.write(name, pair(index))
            return
        pairs = [pair(index) for index in range(count)]
        for key in pairs[0]:
            self.register_buffer(f"{key}s", torch.stack([p[key] for p in pairs]))
        self.item = Kept("pairs", "synthetic", ("images", "labels"), "noise")


@contextmanager
def timed(into: Figures, name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    into[f"{name}, s"] = round(time.perf_counter() - start, 3)


def seal(run: Path, method: Memory, index: int) -> float:
    """Seal a task; returns the MB that it wrote."""
    folder = task_folder(run, index, "t")
    before = task_folder(run, index - 1, "t") if index else None
    entries = write_kept(folder, method.state_dict(), [method.item], 1, method.files, method.store, before)
    write_ledger(folder, "t", entries, patients=False)
    return size(folder)


def size(place: Path) -> float:
    """MB of a file or folder."""
    files = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [place]
    return round(sum(p.stat().st_size for p in files) / 1e6, 2)


def measure(run: Path, count: int, side: int, in_files: bool) -> Figures:
    """Figures of one way to keep the pairs."""

    def pair(index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        label = torch.randint(0, 20, (side, side), generator=draw, dtype=torch.int32)
        return {"image": torch.rand(3, side, side, generator=draw), "label": label}

    found: Figures = {}
    method = Memory(FileStore(run / "kept"))
    with timed(found, "making the pairs"):
        method.keep(count, pair, in_files)
    checkpoint = Checkpoint(run / "resume", Machine(EngineOptions(device="cpu", trackers=())), 0)
    checkpoint.save(method, 0, Position())  # the first one makes the folder
    with timed(found, "save"):
        checkpoint.save(method, 0, Position())
    found["save, MB"] = size(run / "resume" / "state.safetensors")
    for index, name in enumerate(("sealing its task", "sealing the next task")):
        with torch.no_grad():
            method.network.weight.add_(1)
        with timed(found, name):
            written = seal(run, method, index)
        found[f"{name}, MB"] = written
    if in_files:
        with timed(found, "reading all pairs once"):
            samples = FileSamples(method.store.paths(method.files["pairs"]))
            for index in range(len(samples)):
                samples[index]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if not given")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {}
    for name in ("buffers", "files"):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            figures[name] = measure(Path(folder), given.pairs, given.side, name == "files")
    for key in figures["files"]:
        print(f"{key:28}", *(f"{name} {figures[name].get(key, float('nan')):10}" for name in figures))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
