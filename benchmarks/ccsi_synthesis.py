"""Class impressions a second, against a straightforward loop over one group at a time, at equal loss.

    python benchmarks/ccsi_synthesis.py [--norm batch] [--groups 8] [--steps 100] [--quality] [--json FILE]

The teacher is the small residual net, trained on scikit-learn's handwritten digits. The straightforward loop takes
one group of 40 after the other, collects moments by hooks with ``mean`` and ``var``, moves the images within the
graph, and builds gradients of the network's parameters too. Both sides get the same terms, the same schedule and the
same random draws. Final losses are computed by one function, in float32 and without moves, and must agree within
:data:`TOLERANCE`. Peak memory is taken in processes of their own.

``--quality`` trains fresh networks on impressions alone and tests them on real digits of other writers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.data.readers.single_digits import SingleDigits
from perdure.methods.ccsi.impressions import Objective, Request, plan_groups, start_images, synthesise
from perdure.methods.ccsi.memory import class_moment_sums, class_moments
from perdure.methods.ccsi.options import SynthesisOptions
from perdure.networks.classifier import Classifier
from perdure.networks.cosine_resnet import cosine_resnet
from perdure.seeds import derive_seed

CLASSES, PUBLISHED_STEPS = 10, 5000
WAYS = ("straightforward", "perdure fp32", "perdure bf16")
TOLERANCE = 0.02
"""Largest relative difference of final losses that counts as equal."""


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 32, 32)`` in [0, 1] with a border of two pixels, and classes ``(N,)``."""
    source = SingleDigits(28)
    names = source.names(split)
    images = torch.stack([torch.from_numpy(source.image(split, name)) for name in names])
    labels = torch.tensor([int(source.mask(split, name)) - 1 for name in names])
    return F.pad(images.float() / 255, (2, 2, 2, 2)), labels


def train(images: Tensor, labels: Tensor, norm: str, steps: int, device: torch.device, seed: int = 0) -> Classifier:
    """A small residual net with cosine head, in evaluation mode."""
    torch.manual_seed(seed)
    network = cosine_resnet(images.shape[1], norm=norm)
    network.grow(CLASSES)
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        pick = torch.randint(len(images), (40,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[pick].to(device))[0], labels[pick].to(device)).backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    device = network.head.scale.device
    found = torch.cat([network(part.to(device))[0].argmax(1).cpu() for part in images.split(200)])
    return (found == labels).float().mean().item()


def straightforward(teacher: Classifier, job: Request, options: SynthesisOptions) -> Tensor:
    """The published loop: group by group, everything by autograd, moments by hooks, torch's Adam."""
    seen: list[tuple[Tensor, Tensor]] = []
    norms = [part for part in teacher.modules() if isinstance(part, nn.BatchNorm2d)]

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        flat = given[0].permute(1, 0, 2, 3).reshape(given[0].shape[1], -1)
        seen.append((flat.mean(1), flat.var(1, unbiased=False)))

    hooks = [part.register_forward_pre_hook(look) for part in norms]
    done = []
    for row, number in enumerate(job.numbers):
        alone = Request(job.targets[row : row + 1], [number], job.seed, job.means)
        images, targets = start_images(alone, options).requires_grad_(), job.targets[row].to(job.means.device)
        adam = torch.optim.Adam([images], lr=options.lr, betas=options.betas)
        shifts, flips = moves(job.seed, number, options)
        for step in range(options.steps):
            adam.param_groups[0]["lr"] = options.rate(step)
            moved = torch.roll(images, tuple(shifts[step].tolist()), (2, 3))
            moved = moved.flip(3) if flips[step] else moved
            adam.zero_grad()
            teacher.zero_grad()
            seen.clear()
            loss = options.kappa * F.cross_entropy(teacher(moved)[0], targets) + priors(moved, options)
            for layer, ((mean, var), norm) in enumerate(zip(seen, norms, strict=True)):
                apart = (var - norm.running_var).norm() + (mean - norm.running_mean).norm()
                loss = loss + options.moments * (options.first_layer if layer == 0 else 1.0) * apart
            loss.backward()
            adam.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        done.append(images.detach())
    for hook in hooks:
        hook.remove()
    return torch.cat(done)


def moves(seed: int, number: int, options: SynthesisOptions) -> tuple[Tensor, Tensor]:
    """Shifts ``(steps, 2)`` and mirrorings ``(steps,)`` of a group, as the package draws them."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "moves", number))
    shifts = torch.randint(-options.jitter, options.jitter + 1, (options.steps, 2), generator=generator)
    return shifts, torch.rand(options.steps, generator=generator) < 0.5 * options.flip


def priors(x: Tensor, options: SynthesisOptions) -> Tensor:
    straight = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    parts = (*straight, x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:])
    return options.tv2 * sum(part.norm() for part in parts) + options.l2 * x.flatten(1).norm(dim=1).mean()


def loss_of(teacher: Classifier, images: Tensor, job: Request, options: SynthesisOptions) -> float:
    """Mean total loss of the groups."""
    with torch.no_grad():
        terms = Objective(teacher, options).terms(images, job.targets.to(images.device))
    return torch.stack(list(terms.values())).sum(0).mean().item()


def make_job(means: Tensor, groups: int, options: SynthesisOptions) -> Request:
    return Request(plan_groups(groups, CLASSES, options, 0), range(groups), 0, means)


def settings(steps: int, **changed: Any) -> SynthesisOptions:
    return SynthesisOptions(**{"steps": steps, "warmup": steps // 10, "statistics": "none", **changed})


class Scene(NamedTuple):
    """A trained teacher and the means of its classes."""

    teacher: Classifier
    images: Tensor
    labels: Tensor
    means: Tensor


def prepare(norm: str, channels: int, device: torch.device) -> Scene:
    images, labels = digits("train")
    images = images.expand(-1, channels, -1, -1)
    teacher = train(images, labels, norm, 200, device)
    means = torch.stack([images[labels == k].mean(0) for k in range(CLASSES)]).to(device)
    return Scene(teacher, images, labels, means)


def ways(scene: Scene, groups: int, steps: int, **changed: Any) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """What is compared: groups and work."""
    plain, half = settings(steps, precision="fp32", **changed), settings(steps, precision="bf16", **changed)
    few, many = make_job(scene.means, 1, plain), make_job(scene.means, groups, plain)
    work = (
        (1, lambda: straightforward(scene.teacher, few, plain)),
        (groups, lambda: synthesise(scene.teacher, many, plain).images),
        (groups, lambda: synthesise(scene.teacher, many, half).images),
    )
    return dict(zip(WAYS, work, strict=True))


def speed(scene: Scene, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways under one schedule; they take turns, and the shortest time of each counts."""
    plain = settings(arguments.steps)
    first = make_job(scene.means, 1, plain)
    best: dict[str, float] = {}
    losses: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for name, (groups, work) in ways(scene, arguments.groups, arguments.steps).items():
            start = time.perf_counter()
            images = work()
            if images.is_cuda:
                torch.cuda.synchronize()
            best[name] = min(best.get(name, float("inf")), (time.perf_counter() - start) / groups)
            losses[name] = loss_of(scene.teacher, images[: plain.group_size], first, plain)  # one group for all
    rows = []
    for name, seconds in best.items():
        rate, apart = plain.group_size / seconds, losses[name] / losses["straightforward"] - 1
        rows.append(
            {
                "way": name,
                "ms_a_step": 1e3 * seconds / arguments.steps,
                "impressions_a_second": rate,
                "impressions_a_second_of_5000_steps": rate * arguments.steps / PUBLISHED_STEPS,
                "faster": best["straightforward"] / seconds,
                "loss": losses[name],
                "loss_difference": apart,
                "equal": abs(apart) <= TOLERANCE,
            }
        )
    return rows


def peak(way: str, norm: str, channels: int, groups: int, device: str) -> float:
    """Peak MiB above what is held once libraries are loaded; an untrained teacher takes as much as a trained one."""
    teacher = cosine_resnet(channels, norm=norm).to(device).eval()
    teacher.grow(CLASSES)
    means = torch.rand(CLASSES, channels, 32, 32, device=device)
    scene = Scene(teacher, means, torch.arange(CLASSES), means)
    ways(scene, 1, 2, group_size=2)[way][1]()
    before = held(device)
    ways(scene, groups, 6)[way][1]()
    return (held(device) - before) / 2**20


def held(device: str) -> int:
    """Peak bytes so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quality(scene: Scene, groups: int, steps: int) -> list[dict[str, Any]]:
    """Accuracy of the teacher on what stands for real images, and of fresh networks trained on that alone."""
    teacher, images, labels, means = scene
    pictures, truth = digits("test")
    test = pictures.expand(-1, images.shape[1], -1, -1), truth
    sums = class_moment_sums(teacher, images.to(means.device), labels.to(means.device), CLASSES)
    some = make_job(means, groups, settings(steps))
    targets = some.targets.flatten()
    pick = torch.cat([torch.nonzero(labels == k).flatten()[: len(targets) // CLASSES] for k in range(CLASSES)])
    sets = {
        "real images": (images[pick], labels[pick]),
        "mean images": (means.cpu()[targets], targets),
        "mean images with noise": (start_images(some, settings(steps)).cpu(), targets),
    }
    kinds = {"impressions": {}, "impressions from noise": {"start": "noise"}}
    if class_moments(sums).shape[1]:
        kinds["impressions, class statistics"] = {"statistics": "class"}
    for name, changed in kinds.items():
        made = synthesise(teacher, replace(some, moments=class_moments(sums)), settings(steps, **changed))
        sets[name] = (made.images.cpu(), made.labels.cpu())
    rows = []
    for name, (x, y) in sets.items():
        norm = "continual" if class_moments(sums).shape[1] else "batch"
        fresh = [round(accuracy(train(x, y, norm, 200, means.device, seed), *test), 4) for seed in (1, 2, 3)]
        spread = torch.stack([x[y == k].std(0).mean() for k in range(CLASSES)]).mean().item()
        rows.append(
            {
                "trained_on": name,
                "images": len(x),
                "teacher_accuracy": accuracy(teacher, x, y),
                "deviation_within_class": spread,
                "fresh_accuracy": fresh,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps({name: round(v, 4) if type(v) is float else v for name, v in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=["continual", "batch"], default="continual")
    parser.add_argument("--channels", type=int, default=3, help="3 shows the grey digits in every channel")
    parser.add_argument("--groups", type=int, default=8, help="groups of 40 at once")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for way in WAYS:  # before anything large: a new process starts with the peak of this one
        with context.Pool(1) as pool:
            how = arguments.norm, arguments.channels, arguments.groups, arguments.device
            peaks[way] = pool.apply(peak, (way, *how))
    scene = prepare(arguments.norm, arguments.channels, torch.device(arguments.device))
    about = {"torch": torch.__version__, "device": arguments.device, "threads": torch.get_num_threads()}
    pick, some = torch.arange(40) * len(scene.images) // 40, settings(arguments.steps)
    real = replace(make_job(scene.means, 1, some), targets=scene.labels[pick][None])
    about["loss_of_real_images"] = loss_of(scene.teacher, scene.images[pick].to(arguments.device), real, some)
    show([about])
    rows = [row | {"peak_mib": peaks[row["way"]]} for row in speed(scene, arguments)]
    show(rows)
    trained = quality(scene, arguments.groups, arguments.steps) if arguments.quality else []
    show(trained)
    if arguments.json:
        arguments.json.write_text(json.dumps(about | {"ways": rows, "quality": trained}, indent=2) + "\n")
    if not all(row["equal"] for row in rows):
        raise SystemExit(f"final losses differ by more than {TOLERANCE:.0%}: the times are of different work")


if __name__ == "__main__":
    main()
