"""Class impressions a second, against a straightforward loop over one group at a time, at equal loss.

    python benchmarks/ccsi_synthesis.py [--norm batch] [--groups 4] [--steps 60] [--device cuda] [--quality] [--json FILE]

The teacher is the small residual net, trained on scikit-learn's handwritten digits. The straightforward loop takes
one group of 40 after the other, collects moments by hooks with ``mean`` and ``var``, moves the images within the
graph, and builds gradients of the network's parameters too. Both sides get the same terms, the same schedule and the
same random draws; final losses are computed by one function, in float32 and without moves.

``--to-equal-loss`` compares schedules: the published one with the number of steps given, against the clean one with
fewer. ``--quality`` trains a fresh network on impressions alone and tests it on real digits of other writers.
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
from torch import Tensor, nn

from perdure.data.single_digits import SingleDigits
from perdure.methods.ccsi.objective import Objective
from perdure.methods.ccsi.synthesis import Job, SynthesisOptions, plan_groups, start_images, synthesise
from perdure.networks.classifier import Classifier
from perdure.networks.cosine_resnet import cosine_resnet
from perdure.seeds import fold

CLASSES, PUBLISHED_STEPS = 10, 5000
Ways = dict[str, Callable[[], Tensor]]


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
    network = cosine_resnet(1, norm=norm)
    network.grow(CLASSES)
    network.to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(steps):
        pick = torch.randint(len(images), (40,))
        optimizer.zero_grad()
        F.cross_entropy(network(images[pick].to(device))[0], labels[pick].to(device)).backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    device = network.head.scale.device
    right = [
        network(part.to(device))[0].argmax(1).cpu() == truth
        for part, truth in zip(images.split(200), labels.split(200), strict=True)
    ]
    return torch.cat(right).float().mean().item()


def straightforward(teacher: Classifier, job: Job, options: SynthesisOptions) -> Tensor:
    """The published loop: group by group, everything by autograd, moments by hooks, torch's Adam."""
    seen: list[tuple[Tensor, Tensor]] = []
    norms = [part for part in teacher.modules() if isinstance(part, nn.BatchNorm2d)]

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        flat = given[0].permute(1, 0, 2, 3).reshape(given[0].shape[1], -1)
        seen.append((flat.mean(1), flat.var(1, unbiased=False)))

    hooks = [part.register_forward_pre_hook(look) for part in norms]
    done = []
    for row, number in enumerate(job.numbers):
        alone = Job(job.targets[row : row + 1], [number], job.seed, job.means)
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
    generator = torch.Generator().manual_seed(fold(seed, "moves", number))
    shifts = torch.randint(-options.jitter, options.jitter + 1, (options.steps, 2), generator=generator)
    return shifts, torch.rand(options.steps, generator=generator) < 0.5 * options.flip


def priors(x: Tensor, options: SynthesisOptions) -> Tensor:
    parts = (
        x[..., :, 1:] - x[..., :, :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return options.tv2 * sum(part.norm() for part in parts) + options.l2 * x.flatten(1).norm(dim=1).mean()


def loss_of(teacher: Classifier, images: Tensor, job: Job, options: SynthesisOptions) -> float:
    """Mean total loss of the groups."""
    with torch.no_grad():
        terms = Objective(teacher, options).terms(images, job.targets.to(images.device))
    return torch.stack(list(terms.values())).sum(0).mean().item()


def make_job(means: Tensor, groups: int, options: SynthesisOptions) -> Job:
    return Job(plan_groups(groups, CLASSES, options, 0), range(groups), 0, means)


def settings(steps: int, **changed: Any) -> SynthesisOptions:
    return SynthesisOptions(**{"steps": steps, "warmup": steps // 10, "statistics": "none", **changed})


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    start = time.perf_counter()
    images = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, images


def speed(teacher: Classifier, means: Tensor, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both ways under one schedule; they take turns, and the shortest time of each counts."""
    device, groups, rows = means.device, arguments.groups, []
    plain = settings(arguments.steps, precision="fp32")
    few, many = make_job(means, 1, plain), make_job(means, groups, plain)
    ways: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "straightforward": (1, lambda: straightforward(teacher, few, plain)),
        "perdure fp32": (groups, lambda: synthesise(teacher, many, plain).images),
        "perdure bf16": (groups, lambda: synthesise(teacher, many, settings(arguments.steps)).images),
    }
    best: dict[str, float] = {}
    losses: dict[str, float] = {}
    for _ in range(arguments.repeats):
        for name, (count, work) in ways.items():
            seconds, images = timed(work, device)
            best[name] = min(best.get(name, float("inf")), seconds / count)
            losses[name] = loss_of(teacher, images[:40], few, plain)  # the same group everywhere
    for name, seconds in best.items():
        rate = plain.group_size / seconds
        rows.append({
            "way": name,
            "ms_a_step": 1e3 * seconds / arguments.steps,
            "impressions_a_second": rate,
            "impressions_a_second_of_5000_steps": rate * arguments.steps / PUBLISHED_STEPS,
            "faster": best["straightforward"] / seconds,
            "loss": losses[name],
            "loss_difference": losses[name] / losses["straightforward"] - 1,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--norm", choices=["continual", "batch"], default="continual")
    parser.add_argument("--groups", type=int, default=4, help="groups at once")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    images, labels = digits("train")
    teacher = train(images, labels, arguments.norm, 200, device)
    print(f"teacher: {100 * accuracy(teacher, *digits('test')):.1f} % of the test digits")
    means = torch.stack([images[labels == k].mean(0) for k in range(CLASSES)]).to(device)
    for row in speed(teacher, means, arguments):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
