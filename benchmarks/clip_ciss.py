"""Time and memory of CLIP-CISS: region means, mask losses, steps, inference, and the full-size network.

    python benchmarks/clip_ciss.py [--device cuda] [--repeats 3] [--batch 2] [--size 512] [--skip full] [--json FILE]

Each measurement runs in a process of its own, so that peak memory is that of the measurement. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data.case import Batch, Grid
from perdure.data.preparation import Photo2D
from perdure.inference.case import predict_cases
from perdure.labels import label_space
from perdure.methods.clip_ciss.clip_ciss import ClipCiss
from perdure.methods.clip_ciss.gpd import pixel_weights, region_means
from perdure.methods.clip_ciss.options import ClipCissOptions
from perdure.methods.clip_ciss.regions import Regions
from perdure.methods.clip_ciss.terms import dice, focal, mask_losses
from perdure.methods.options import Setup, TrainingOptions
from perdure.networks.clip.segmenter import clip_segmenter
from perdure.streams.task import Task

MIB = 1 << 20
DIM = 512


class Measured:
    """Shortest time of some repeats in seconds, and the peak memory above what was there before, in MiB.

    On a CPU it is time of the processor, which other work on the machine moves little.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, work: Callable[[], object]) -> dict[str, float]:
        """Measure ``work``."""
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else _peak()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter if cuda else time.process_time
        times = []
        for _ in range(self.repeats):
            start = clock()
            work()
            if cuda:
                torch.cuda.synchronize()
            times.append(clock() - start)
        peak = torch.cuda.max_memory_allocated() if cuda else _peak()
        return {"seconds": min(times), "mib": (peak - before) / MIB}


def _peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _regions(images: int, classes: int, size: int, each: int) -> Regions:
    """``each`` random blocks per image, of random classes."""
    masks = torch.zeros(images * each, size, size, dtype=torch.bool)
    for mask in masks:
        top, left = torch.randint(0, size // 2, (2,)).tolist()
        mask[top : top + size // 2, left : left + size // 2] = True
    columns = torch.cat([torch.randperm(classes)[:each] for _ in range(images)])
    return Regions(torch.arange(images).repeat_interleave(each), columns, masks)


# Losses ----------------------------------------------------------------------------------------------------------


def region_means_of(measure: Measured, how: str, size: int, classes: int = 100) -> dict[str, float]:
    """Means of two images' features over a mask of every class, forward and backward."""
    torch.manual_seed(0)
    cells = size // 16
    regions = _regions(2, classes, size, classes // 2)
    features = torch.randn(2, DIM, cells, cells, device=measure.device, requires_grad=True)
    images, masks = regions.images.to(measure.device), regions.masks.to(measure.device)

    def adjoint() -> Tensor:
        return region_means(features, images, pixel_weights(masks, features.shape[2:]))

    def direct() -> Tensor:
        full = F.interpolate(features, (size, size), mode="bilinear", align_corners=False).flatten(2)
        flat = masks.flatten(1).float()
        sums = torch.cat([flat[images == image] @ one.t() for image, one in enumerate(full)])
        return sums / flat.sum(1, keepdim=True).clamp_min(1)

    chosen = {"adjoint": adjoint, "direct": direct}[how]
    return measure(lambda: chosen().square().sum().backward())


def mask_losses_of(measure: Measured, how: str, size: int, classes: int = 150) -> dict[str, float]:
    """Focal and dice loss of three stages, two images with four classes each, forward and backward."""
    torch.manual_seed(0)
    regions = Regions(*(part.to(measure.device) for part in _regions(2, classes, size, 4)))
    cells = size // 16
    maps = [torch.randn(2, classes, cells, cells, device=measure.device, requires_grad=True) for _ in range(3)]
    number = torch.tensor(8.0, device=measure.device)

    def gather_first() -> Tensor:
        return sum(mask_losses(maps, regions, number), torch.zeros((), device=measure.device))

    def upsample_all() -> Tensor:
        total = torch.zeros((), device=measure.device)
        wanted = regions.masks.flatten(1).float()
        for logits in maps:
            full = F.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
            few = full[regions.images, regions.columns].flatten(1)
            total = total + focal(few, wanted, number) + dice(few, wanted, number)
        return total

    chosen = {"gather first": gather_first, "upsample all": upsample_all}[how]
    return measure(lambda: chosen().backward())


# The method ------------------------------------------------------------------------------------------------------


def learner(
    encoder: str, classes: int, device: torch.device, size: int, later: bool = True, train: str = "all"
) -> ClipCiss:
    """A method in its second task, which teaches a fifth of the classes, or with all of them learned."""
    torch.manual_seed(0)

    def network() -> Any:
        return clip_segmenter(encoder, input_size=size, train=train)

    options = ClipCissOptions(background="none", text="hash")
    method = ClipCiss(Setup(options, TrainingOptions(optimizer="adamw", lr=1e-5, clip=35), network))
    space = label_space([f"class {k}" for k in range(1, classes + 1)])
    old, ids = classes - classes // 5 if later else classes, space.ids
    tasks = [Task(0, "old", ids[:old], (), frozenset(ids[:old]), space=space)]
    if later:
        tasks.append(Task(1, "new", ids[old:], ids[:old], frozenset(ids[old:]), space=space))
    for task in tasks:
        method.begin(task)
        method.phases(task)
    return method.to(device)


def step_of(
    measure: Measured, encoder: str, classes: int, size: int, batch: int, train: str = "all"
) -> dict[str, float]:
    """One training step with all terms: teacher, student, losses, optimiser."""
    method = learner(encoder, classes, measure.device, size, train=train).train()
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    labels = torch.zeros(batch, size, size, dtype=torch.long)
    new = torch.tensor(method.class_ids[-(classes // 5) :])
    for k, label in enumerate(labels):
        for n in range(4):
            top = n * size // 4
            label[top : top + size // 5, : size // 2] = new[(4 * k + n) % len(new)]
    data = Batch(torch.randn(batch, 3, size, size), labels, ("",) * batch).to(measure.device)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(method.loss(data).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 35)
        optimizer.step()

    return measure(step)


def inference_of(measure: Measured, encoder: str, classes: int, size: int) -> dict[str, float]:
    """One image of ``size`` and four thirds of it, in windows of ``size``."""
    method = learner(encoder, classes, measure.device, size, later=False).eval()
    shape = (size, round(size * 4 / 3))
    photo = Photo2D(patch=(size, size), window=size)
    image = torch.randn(1, 3, *shape, device=measure.device)
    return measure(lambda: predict_cases(method.predict, image, photo, Grid(shape)))


# All of it -------------------------------------------------------------------------------------------------------


def plan(
    size: int, batch: int, skip: set[str]
) -> list[tuple[str, str, Callable[..., dict[str, float]], tuple[Any, ...]]]:
    """Group, name, measurement and its arguments."""
    rows: list[tuple[str, str, Callable[..., dict[str, float]], tuple[Any, ...]]] = []
    rows += [("region means, 100 classes", how, region_means_of, (how, size)) for how in ("adjoint", "direct")]
    rows += [("mask losses, 150 classes", how, mask_losses_of, (how, size)) for how in ("gather first", "upsample all")]
    small = "narrow" if "full" in skip else "vit_b16"
    for classes in (20, 150):
        rows.append(("training step", f"{small}, {classes} classes", step_of, (small, classes, size, batch)))
    for train in ("last-1" if "full" in skip else "last-4", "decoder"):
        rows.append(("training step", f"20 classes, {train} only", step_of, (small, 20, size, batch, train)))
    for classes in (20, 150):
        rows.append(("one image", f"{small}, {classes} classes", inference_of, (small, classes, size)))
    return [row for row in rows if row[0].split(",")[0].split()[0] not in skip]


def run_alone(
    work: Callable[..., dict[str, float]], device: str, repeats: int, given: tuple[Any, ...], out: Any
) -> None:
    """In a child: its peak memory is nobody else's."""
    out.send(work(Measured(torch.device(device), repeats), *given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512, help="side of crops and windows")
    parser.add_argument("--skip", nargs="*", default=[], choices=["region", "mask", "training", "one", "full"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: list[dict[str, Any]] = []
    for group, name, work, given in plan(arguments.size, arguments.batch, set(arguments.skip)):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=run_alone, args=(work, arguments.device, arguments.repeats, given, there))
        process.start()
        there.close()
        try:
            measured = here.recv()
        except EOFError:
            measured = {"seconds": float("nan"), "mib": float("nan")}  # out of memory, most likely
        process.join()
        found.append({"group": group, "name": name, **measured})
        print(f"{group:<28}{name:<24}{measured['seconds']:>9.3f} s{measured['mib']:>10.0f} MiB", flush=True)
    if arguments.json:
        about = {"torch": torch.__version__, "device": arguments.device, "threads": torch.get_num_threads()}
        about |= {"batch": arguments.batch, "size": arguments.size}
        arguments.json.write_text(json.dumps(about | {"rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
