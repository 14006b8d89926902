"""CGR's generator: its training step, its samplers at equal quality, and what the published size costs.

    python benchmarks/generated_pairs.py [--run DIR] [--skip step sampling full] [--device cuda] [--json FILE]

``sampling`` needs the folder of a finished run of the method cgr whose data is at hand, such as one of
`perdure run cgr/phantoms`. Times on a CPU with one thread are processor time, so that other work beside it does not
count. Peak memory is measured in a process of its own (on Linux).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.config.build import build_stream
from perdure.config.data_sets import in_order, open_sources
from perdure.data.volumes.extra import free_memory
from perdure.methods.cgr import bjd, codecs
from perdure.methods.cgr.cgr import Cgr
from perdure.methods.cgr.sampling import agreement
from perdure.methods.cgr.terms import cross_entropy, soft_dice, standardised
from perdure.methods.past import Judge
from perdure.networks.joint_diffusion.network import JointDiffusion, Size
from perdure.networks.segmenter import upsample
from perdure.networks.unit_unet import unit_unet
from perdure.predict import Trained
from perdure.run_folder import RunFolder
from perdure.streams.task import Stream

GIB, MIB = 1 << 30, 1 << 20
SAMPLERS = (("ddim", 100), ("ddim", 50), ("ddim", 25), ("dpm", 25), ("dpm", 20), ("dpm", 15), ("dpm", 10))
"""The first one, which is the published one, is what the others are compared with."""
WORSE_DICE, WORSE_DISTANCE = 0.01, 1.1
"""As good is a sampler that loses at most this Dice, and whose distances are at most so many times as large."""
WIDTHS, LEARNING_STEPS, LEARNING_RATE = (16, 32, 64), 200, 0.003
"""Of the segmenters that show what can be learned from pairs: as in cgr/phantoms."""
HALVINGS = 10
"""Random halves of the real images that distances are averaged over."""


def clock(device: torch.device) -> float:
    """Seconds: of the processor on a CPU with one thread, else of the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def memory(device: torch.device, field: str = "VmHWM") -> float:
    """Memory of this process (or of the GPU) in MiB: its peak, or with ``VmRSS`` what it takes now."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
        return used / MIB
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def in_turns(works: Mapping[Any, Callable[[], object]], device: torch.device, repeats: int) -> dict[Any, float]:
    """Shortest time of each work in seconds; they take turns, so that a busy minute falls on all of them."""
    found = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            start = clock(device)
            work()
            found[name] = min(found[name], clock(device) - start)
    return found


# The training step -----------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a generator learns: its size, the channels and the side of images, the batch, prompts, and the precision."""

    size: Size
    channels: int
    side: int
    batch: int
    width: int = 32
    tokens: int = 8
    bf16: bool = False


SHAPES = {"cgr/phantoms": Shape("smoke", 1, 16, 8), "smoke, 64 pixels": Shape("smoke", 3, 64, 8)}
FULL = Shape("full", 3, 256, 8, 1024, 77, bf16=True)
"""The recipes cgr/cfp and cgr/pfc."""
WAYS = ("one call", "two calls", "two calls, a backward pass each")


class Learner:
    """A generator with random weights that learns the same noisy pairs at every step."""

    def __init__(self, shape: Shape, device: torch.device, tasks: int = 1) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        network = JointDiffusion(shape.channels, shape.width, size=shape.size)
        for _ in range(tasks):
            network.add_adapter()
        with torch.no_grad():
            for p in network.parameters():  # a fresh one answers 0 to everything: any two ways would agree
                p.add_(0.02 * torch.randn_like(p))
        layout = torch.channels_last if shape.bf16 or device.type == "cuda" else torch.contiguous_format
        self.network: JointDiffusion = network.to(device, memory_format=layout)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        pairs = (2 * torch.rand(shape.batch, shape.channels + 1, shape.side, shape.side) - 1).to(device)
        self.made = bjd.passes(pairs, bjd.draw_times(len(pairs), device), ("image",))
        self.text = torch.randn(shape.batch, shape.tokens, shape.width).to(device)
        self.tasks = torch.zeros(shape.batch, dtype=torch.int64, device=device)

    def predict(self, inputs: Tensor, times: Tensor) -> Tensor:
        """The noise in pairs ``(P N, C + 1, H, W)``, P times the same prompts."""
        passes = len(inputs) // len(self.text)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.shape.bf16):
            answer: Tensor = self.network(inputs, times, self.text.repeat(passes, 1, 1), self.tasks.repeat(passes))
        return answer

    def losses(self, way: str) -> dict[str, float]:
        """Leave the gradients of a step, and return its losses."""
        self.optimizer.zero_grad()
        made, names = self.made, ("joint", "conditional")
        parts = [bjd.Passes(*both, passes=1) for both in zip(*(x.chunk(2) for x in made[:3]), strict=True)]
        if way == "two calls, a backward pass each":
            found = {}
            for name, part in zip(names, parts, strict=True):
                loss = bjd.losses(self.predict(part.inputs, part.times), part)["joint"]
                loss.backward()
                found[name] = loss.item()
            return found
        if way == "one call":
            predicted = self.predict(made.inputs, made.times)
        else:
            predicted = torch.cat([self.predict(part.inputs, part.times) for part in parts])
        terms = bjd.losses(predicted, made)
        torch.stack(list(terms.values())).sum().backward()
        return {name: term.item() for name, term in terms.items()}

    def step(self, way: str) -> None:
        """A whole training step."""
        self.losses(way)
        self.optimizer.step()

    def check(self) -> None:
        """Assert that all ways have the same losses and gradients."""
        wanted, gradients = self.losses(WAYS[0]), self._gradients()
        near = 1e-2 if self.shape.bf16 else 1e-5
        for way in WAYS[1:]:
            found = self.losses(way)
            assert all(abs(found[name] - value) < near for name, value in wanted.items()), (way, found, wanted)
            assert (self._gradients() - gradients).norm() < 10 * near * gradients.norm(), way

    def _gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten().clone() for p in self.network.parameters() if p.grad is not None])


def step_times(shape: Shape, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of a training step, each way."""
    learner = Learner(shape, device)
    learner.check()
    return in_turns({way: lambda way=way: learner.step(way) for way in WAYS}, device, repeats)


def step_memory(shape: Shape, device: torch.device, way: str) -> float:
    """Peak memory of three steps beyond what there was before the first, MiB."""
    learner = Learner(shape, device)
    before = memory(device, "VmRSS")
    for _ in range(3):
        learner.step(way)
    return memory(device) - before


def report_step(device: str, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    shapes = SHAPES | ({"cgr/cfp": FULL} if device == "cuda" else {})
    for name, shape in shapes.items():
        times = alone(step_times, (shape, torch.device(device), repeats), threads)
        for way in WAYS:
            mib = alone(step_memory, (shape, torch.device(device), way), threads)
            seconds = (times or {}).get(way)
            print(f"step, {name:<16}{way:<36}{told(seconds, 1000, 'ms')}{told(mib, 1, 'MiB')}", flush=True)
            yield {"recipe": name, "way": way, "seconds": seconds, "mib": mib}


# Samplers --------------------------------------------------------------------------------------------------------


class NoProgress:
    """Pairs are made in one go."""

    saved = None

    def checkpoint(self, *_: object) -> None:
        """Nothing to do."""


class Finished:
    """A finished run of CGR: its generator, its segmenter, and the data that it learned from."""

    def __init__(self, path: Path, device: str) -> None:
        opened = Trained.open(path, device)
        assert isinstance(opened.method, Cgr), f"{path} is no run of the method cgr"
        self.method, self.generator = opened.method, opened.method.generator
        recipe = in_order(RunFolder.existing(path).recipe())
        self.stream: Stream = build_stream(recipe, open_sources(recipe))[0]
        self.real = [self._training(number) for number in range(len(self.generator.cards))]
        self.generator.pairs = self.generator.pairs.model_copy(update={"check_copies": False, "gate": False})

    def _training(self, task: int) -> tuple[Tensor, Tensor]:
        """Training images and their masks in local codes."""
        with self.stream.opened(self.stream.tasks[task]) as opened:
            samples = opened.train()
            cases = [samples[position] for position in range(len(samples))]
        codes = codecs.to_local(torch.stack([case.label for case in cases]), self.generator.cards[task].ids)
        return torch.stack([case.image for case in cases]), codes

    def features(self, images: Tensor) -> Tensor:
        """What the segmenter sees, ``(N, d, h, w)``."""
        with torch.no_grad():
            seen: Tensor = self.method.network.features(standardised(images.to(self.generator.iteration.device)))
        return seen

    def labels(self, images: Tensor) -> Tensor:
        """What it says, in global ids."""
        return self.method.predict(images.to(self.generator.iteration.device)).labels().cpu()

    def make(self, sampler: str, steps: int, task: int, count: int, seed: int) -> tuple[Tensor, Tensor, float]:
        """Pairs as the product makes and stores them: images, local codes, and the share that passes its checks."""
        update = {"sampler": sampler, "steps": steps, "count": count}
        self.generator.pairs = self.generator.pairs.model_copy(update=update)
        judge = Judge(lambda images: self.features(images).mean((2, 3)), self.labels)
        phase = self.generator.generate(self.method, self.stream.tasks[len(self.real) - 1], judge)[task]
        torch.manual_seed(seed)
        files = [phase.make(index, NoProgress()) for index in range(phase.count)]
        images, codes = (torch.cat([file[key] for file in files]) for key in ("images", "labels"))
        sound = sum(int(file["manifest.sound"]) for file in files) / count
        return codecs.from_bytes(images, self.generator.cards[task].ends), codes.long(), sound

    def pooled(self, images: Tensor, codes: Tensor, classes: int) -> dict[str, Tensor]:
        """Features of images: means and deviations ``(N, 2 d)``; of pairs: means per region ``(N, (1 + classes) d)``.

        Deviations too, because the segmenter's normalisation makes means of whole images nearly equal.
        """
        seen = self.features(images).double().cpu()
        masks = F.adaptive_avg_pool2d(F.one_hot(codes, classes + 1).movedim(-1, 1).double(), seen.shape[2:])
        means = torch.einsum("ndhw,nkhw->nkd", seen, masks) / masks.sum((2, 3)).clamp_min(1)[..., None]
        flat = seen.flatten(2)
        return {"images": torch.cat([flat.mean(2), flat.std(2)], 1), "pairs": means.flatten(1)}

    def quality(self, sampler: str, steps: int, task: int, seed: int) -> dict[str, float]:
        """Dice with the segmenter, share that passes the checks, what is learned from them, and distances to real data.

        Measured of as many pairs as are in half of the real data, and compared with such halves: distances depend on
        the numbers of vectors. ``real``: one half of it is compared with the other.
        """
        one, (images, codes) = self.generator.cards[task], self.real[task]
        half, real = len(images) // 2, self.pooled(images, codes, one.classes)
        found, made = dict[str, float](), real
        if sampler != "real":
            images, codes, found["sound"] = self.make(sampler, steps, task, half, seed)
            made = self.pooled(images, codes, one.classes)
        found["dice"] = float(agreement(codes, codecs.to_local(self.labels(images), one.ids), one.classes).mean())
        unseen = tuple(part[half:] for part in self.real[task])
        found["learned"] = learned((images[:half], codes[:half]), unseen, one.classes, seed)
        orders = [torch.randperm(2 * half, generator=torch.Generator().manual_seed(k)) for k in range(HALVINGS)]
        for kind, vectors in real.items():
            other = [made[kind][order[half:]] if sampler == "real" else made[kind] for order in orders]
            apart = [frechet(vectors[order[:half]], some) for order, some in zip(orders, other, strict=True)]
            found[kind] = sum(apart) / HALVINGS
        return found


def learned(pairs: tuple[Tensor, Tensor], real: tuple[Tensor, Tensor], classes: int, seed: int) -> float:
    """Dice on real images of a new segmenter that was trained on nothing but these pairs (spec CGR 5.6)."""
    torch.manual_seed(seed)
    images, codes = pairs
    network = unit_unet(images.shape[1], WIDTHS).train()
    network.grow(1 + classes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    for _ in range(LEARNING_STEPS):
        chosen = torch.randint(len(images), (8,))
        logits = upsample(network(standardised(images[chosen]))[0].float(), codes.shape[1:])
        loss = soft_dice(logits, codes[chosen]) + cross_entropy(logits, codes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        seen = network.eval().full_logits(standardised(real[0])).argmax(1)
    return float(agreement(real[1], seen, classes).mean())


def frechet(one: Tensor, other: Tensor) -> float:
    """Frechet distance of two Gaussians with the moments of vectors ``(N, d)`` and ``(M, d)``.

    ``|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½)`` (Dowson and Landau 1982).
    """
    first, second = one.T.double().cov(), other.T.double().cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (one.double().mean(0) - other.double().mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * mixed)


def speeds(path: Path, device: str, repeats: int) -> dict[tuple[str, int], float]:
    """Pairs per second of each sampler, of one file of pairs of the last task, with everything that is done to them."""
    run = Finished(path, device)
    task, count = len(run.real) - 1, run.generator.pairs.batch
    works = {(sampler, steps): lambda s=sampler, n=steps: run.make(s, n, task, count, 0) for sampler, steps in SAMPLERS}
    return {name: count / seconds for name, seconds in in_turns(works, torch.device(device), repeats).items()}


Measured = list[list[dict[str, float]]]
"""What was measured, by task and seed."""


def qualities(path: Path, device: str, seeds: int) -> dict[tuple[str, int], Measured]:
    """Of the real data and of each sampler, with the same seeds for all of them."""
    run, found = Finished(path, device), dict[tuple[str, int], Measured]()
    for name in (("real", 0), *SAMPLERS):
        every = range(1 if name[0] == "real" else seeds)
        found[name] = [[run.quality(*name, task, seed) for seed in every] for task in range(len(run.real))]
        for one, rows in zip(run.generator.cards, found[name], strict=True):
            means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
            figures = "".join(f"  {key} {value:.4g}" for key, value in means.items())
            print(f"{name[0]} {name[1] or '':<5}{one.name:<12}{figures}", flush=True)
    return found


def compared(rows: Measured, first: Measured, key: str) -> tuple[float, float, float]:
    """Mean over tasks and seeds, difference to the first sampler, and the standard error of that over the seeds."""
    here, there = (torch.tensor([[row[key] for row in task] for task in table]).mean(0) for table in (rows, first))
    return float(here.mean()), float((here - there).mean()), float((here - there).std() / len(here) ** 0.5)


def as_good(figures: Mapping[str, tuple[float, float, float]]) -> bool:
    """Whether a sampler keeps to the limits of what is called as good."""
    near = all(figures[key][0] <= WORSE_DISTANCE * (figures[key][0] - figures[key][1]) for key in ("images", "pairs"))
    return near and all(figures[key][1] >= -WORSE_DICE for key in ("dice", "learned"))


def report_sampling(path: Path, device: str, threads: int, repeats: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Rate and quality of each sampler beside those of the first."""
    rates = alone(speeds, (path, device, repeats), threads)
    found = alone(qualities, (path, device, seeds), threads)
    if not rates or not found:
        return
    yield {"sampler": "real", "tasks": found["real", 0]}
    for name in SAMPLERS:
        figures = {
            key: compared(found[name], found[SAMPLERS[0]], key)
            for key in ("dice", "learned", "images", "pairs", "sound")
        }
        factor, good = rates[name] / rates[SAMPLERS[0]], as_good(figures)
        words = "".join(
            f"  {key} {mean:.4g} ({more:+.2g} ± {error:.1g})" for key, (mean, more, error) in figures.items()
        )
        verdict = "as good" if good else "worse"
        print(f"{name[0]} {name[1]:<5}{rates[name]:>7.1f} pairs/s{factor:>6.1f} x{words}  {verdict}", flush=True)
        measured = {"rate": rates[name], "as_good": good, "figures": figures, "tasks": found[name]}
        yield {"sampler": name[0], "steps": name[1], **measured}


# The published size ----------------------------------------------------------------------------------------------


def full_step(batch: int, device: torch.device) -> dict[str, float]:
    """Parameters, and time and peak memory of one training step of the published generator, after three tasks."""
    learner = Learner(FULL._replace(batch=batch), device, tasks=3)
    if device.type == "cuda":
        learner.step(WAYS[0])  # kernels are chosen
    seconds = in_turns({"step": lambda: learner.step(WAYS[0])}, device, 3 if device.type == "cuda" else 1)["step"]
    parameters = sum(p.numel() for p in learner.network.parameters())
    return {"parameters": parameters, "seconds": seconds, "mib": memory(device)}


def full_call(batch: int, device: torch.device) -> dict[str, float]:
    """Time and peak memory of one of the calls that take noise away."""
    learner = Learner(FULL._replace(batch=batch), device, tasks=3)
    inputs, times = learner.made.inputs[:batch], learner.made.times[:batch]
    with torch.no_grad():
        found = in_turns({"call": lambda: learner.predict(inputs, times)}, device, 3 if device.type == "cuda" else 2)
    return {"seconds": found["call"], "mib": memory(device)}


def report_full(device: str, threads: int, most_seconds: float, most_gib: float) -> Iterator[dict[str, Any]]:
    """The largest of the batches 1, 2 and 8 that stays within the limits, and what it comes to for three tasks."""
    if device == "cpu" and free_memory() < (most_gib + 4) * GIB:
        print(f"full: left out, {free_memory() / GIB:.0f} GiB of memory are free and {most_gib + 4:.0f} are asked for")
        return
    best: dict[str, dict[str, float]] = {}
    for name, work in (("step", full_step), ("call", full_call)):
        for batch in (1, 2, 8):
            # time grows with the batch: what would take too long is not tried
            if name in best and batch / best[name]["batch"] * best[name]["seconds"] > most_seconds:
                break
            found = alone(
                work, (batch, torch.device(device)), threads, most_seconds + 120, None if device == "cuda" else most_gib
            )
            if found is None or found["seconds"] > most_seconds:
                print(f"full, {name:<6}batch {batch}: more than {most_seconds:.0f} s or {most_gib:.0f} GiB", flush=True)
                break
            best[name] = {"batch": batch, **found}
            print(f"full, {name:<6}batch {batch}{found['seconds']:>9.2f} s{found['mib']:>10.0f} MiB", flush=True)
            yield {"what": name, **best[name]}
    if len(best) == 2:
        yield total(best["step"], best["call"])


def total(step: Mapping[str, float], call: Mapping[str, float]) -> dict[str, Any]:
    """Hours of 400,000 steps with 8 pairs per task, of 3,000 pairs per task and end of a task, and bytes kept."""
    hours = {
        "steps of a task": 400_000 * 8 / step["batch"] * step["seconds"] / 3600,
        "pairs of a task": 3_000 * 100 / call["batch"] * call["seconds"] / 3600,
    }
    # all tasks so far are generated anew at the end of each of three tasks
    hours["three tasks"] = 3 * hours["steps of a task"] + (1 + 2 + 3) * hours["pairs of a task"]
    kept = {"generator": 4 * step["parameters"], "pairs of three tasks": 3 * 3_000 * (FULL.channels + 1) * FULL.side**2}
    print(f"full: {step['parameters']:,.0f} parameters with three adapters")
    print("full: " + ", ".join(f"{name} {value:,.0f} h" for name, value in hours.items()))
    print("full: " + ", ".join(f"{name} {value / 1e6:,.0f} MB kept" for name, value in kept.items()), flush=True)
    return {"what": "total", "hours": hours, "bytes": kept}


# All of it -------------------------------------------------------------------------------------------------------


def told(value: float | None, times: float, unit: str) -> str:
    return f"{'-' if value is None else f'{times * value:.1f}':>10} {unit}"


def alone(
    work: Callable[..., Any], given: tuple[Any, ...], threads: int, limit: float | None = None, gib: float | None = None
) -> Any:
    """What a child finds out, whose peak memory is nobody else's; ``None`` where it dies or takes too long."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, given, threads, gib, there))
    child.start()
    there.close()
    try:
        answer = here.recv() if here.poll(limit) else None
    except EOFError:
        answer = None
    if child.is_alive() and answer is None:
        child.terminate()
    child.join()
    return answer


def _child(work: Callable[..., Any], given: tuple[Any, ...], threads: int, gib: float | None, out: Any) -> None:
    torch.set_num_threads(threads)
    if gib is not None:
        # an allocation beyond this fails here, instead of the system ending whatever it likes
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), int(gib * GIB)))
    out.send(work(*given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="finished run of the method cgr, for the part sampling")
    parser.add_argument("--skip", nargs="*", default=[], choices=["step", "sampling", "full"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=6, help="of the noise that pairs are made from")
    parser.add_argument("--seconds", type=float, default=180, help="limit of a step and a call of the published size")
    parser.add_argument("--gib", type=float, default=12, help="limit of its memory on a CPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "device": given.device, "threads": given.threads}
    if "step" not in given.skip:
        found["step"] = list(report_step(given.device, given.threads, given.repeats))
    if "sampling" not in given.skip and given.run is not None:
        asked = (given.run, given.device, given.threads, given.repeats, given.seeds)
        found["sampling"] = list(report_sampling(*asked))
    elif "sampling" not in given.skip:
        print("sampling: left out, it needs the folder of a finished run (--run DIR)")
    if "full" not in given.skip:
        found["full"] = list(report_full(given.device, given.threads, given.seconds, given.gib))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
