"""The generator of pairs as a part that a method owns: it learns each task, and makes pairs of all tasks at its end.

CGR trains its segmenter on these pairs. So may any other method that trains on a mix of sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.data.tensors import FileSamples
from perdure.engine.phases import Collect, Generate, Phase, Progress, Terms, Train
from perdure.engine.schedules import by_name
from perdure.engine.state import Stateful
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.methods.cgr import bjd, codecs, knowledge, stock
from perdure.methods.cgr.copies import RealImages, all_grey
from perdure.methods.cgr.knowledge import Knowledge
from perdure.methods.cgr.options import Defect, GeneratorOptions, PairOptions
from perdure.methods.cgr.pairs import Manifest
from perdure.methods.cgr.prompts import Card
from perdure.methods.cgr.sampling import agreement, denoise, sound
from perdure.methods.cgr.stock import PairStock
from perdure.methods.past import LOOKS, Judge, mixed
from perdure.networks.joint_diffusion.network import JointDiffusion
from perdure.networks.joint_diffusion.noise import STEPS
from perdure.streams.task import Task


class PairGenerator(nn.Module):
    """A joint diffusion network, what it knows of each task, and the stock of pairs.

    See :class:`~perdure.methods.past.Past`.

    Args:
        options: Of the network and its training.
        pairs: Of what it makes.
        channels: Channels of the images.
        compat: Published defects to bring back.

    Attributes:
        iteration: Steps of the present task, a buffer: the clean part of conditional passes takes turns by it.
    """

    iteration: Tensor

    def __init__(
        self, options: GeneratorOptions, pairs: PairOptions, channels: int, compat: Sequence[Defect] = ()
    ) -> None:
        super().__init__()
        if options.text == "clip" and options.text_folder is None:
            raise UsageError("text=clip needs the folder of a text encoder", "set method.generator.text_folder=DIR")
        self.options, self.pairs, self.compat = options, pairs, frozenset(compat)
        self.network = JointDiffusion(
            channels, options.text_width, size=options.size, checkpointing=options.checkpointing
        )
        self.known, self.stock = Knowledge(options), PairStock(pairs)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self._step = 0  # the same as a number: reading a buffer of a GPU waits for it
        self._real: RealImages | None = None  # while pairs are made

    @property
    def cards(self) -> list[Card]:
        """One card per task so far."""
        return self.known.cards

    @property
    def taught(self) -> list[tuple[int, ...]]:
        """The classes that each task so far annotates."""
        return [one.ids for one in self.cards]

    def begin(self, task: Task) -> None:
        """Write the task's card and append its adapter."""
        self.known.begin(task)
        self.iteration = torch.zeros_like(self.iteration)
        if not self.options.adapters:
            return
        self.network.add_adapter(self.options.gamma)
        last = len(self.network.adapters) - 1
        for number, adapter in enumerate(self.network.adapters):
            old = self.options.freeze_past_adapters and number < last
            adapter.requires_grad_("frozen_adapters" not in self.compat and not old)

    # Phases ---------------------------------------------------------------------------------------------------

    def learn(self, owner: Stateful, task: Task) -> list[Phase]:
        """Count what the task's masks show, then train the network on the task and on generated pairs.

        Raises:
            UsageError: Images of this size cannot be made.
        """
        options, later = self.options, task.index > 0
        if task.preparation.patch:
            self.network.check_size(task.preparation.patch)

        def looks() -> Batches:
            samples = task.train()
            even = torch.ones(len(samples))
            return Batches(samples, 8, drop_last=False, weights=even, draws=max(LOOKS, len(samples)))

        def data() -> Batches | Mix:
            return mixed(task, self.samples(owner, task), options.batch_size)

        def keep(sums: dict[str, Tensor]) -> None:
            self.known.keep(sums, all_grey(task.train()))

        return [
            Collect("labels", self, looks, self.known.measure, keep),
            Train(
                name="generator",
                module=self.network,
                loss=self.loss,
                optimizer=self._optimizer,
                data=data,
                schedule=by_name(options.schedule),
                steps=(options.later_steps or options.steps) if later else options.steps,
                clip=options.clip,
                ema=options.ema,
                precision=options.precision,
                after_step=self._count_step,
                finish=partial(self.stock.sign, self.network, task.index),
            ),
        ]

    def generate(self, owner: Stateful, task: Task, judge: Judge) -> list[Phase]:
        """Make pairs of every task so far, or of this one alone where earlier ones keep their first pairs.

        Args:
            owner: Whose files they become.
            task: The task under way.
            judge: The trained segmenter.
        """
        chosen = self.cards[-1:] if self.pairs.source == "first" else self.cards
        count = -(-self.pairs.count // self.pairs.batch)
        phases: list[Phase] = []
        for one in chosen:

            def make(index: int, progress: Progress, one: Card = one) -> Mapping[str, Tensor]:
                return self._make(one, task.index, index, progress, judge, self._real_images(one, task, judge))

            def finish(paths: Sequence[Path], one: Card = one, last: bool = one is chosen[-1]) -> None:
                self._real = None
                self.stock.take(one, paths, task.index)
                if last:
                    self.stock.finish(owner, task, self.cards, self.known.sides[-1].tolist())

            phases.append(Generate("pairs", self, count, make, finish, self.stock.key(one, task.index), one.name))
        return phases

    def samples(self, owner: Stateful, task: Task) -> list[FileSamples]:
        """Generated pairs of each earlier task, see :meth:`~perdure.methods.cgr.stock.PairStock.past`."""
        return self.stock.past(owner, task, self.cards, self.known.sides.tolist())

    def replayed(self, owner: Stateful) -> int:  # noqa: ARG002
        """Generated pairs that the present task trains on."""
        return int(self.stock.replayed)

    # The loss -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Terms:
        """L_BJ of real pairs and of generated ones (spec CGR 2.2)."""
        pairs, places, tasks = self._encoded(batch)
        times = bjd.draw_times(len(pairs), pairs.device)
        if "frozen_timesteps" in self.compat and len(self.cards) > 1:
            fixed = torch.Generator().manual_seed(0)
            times = torch.randint(STEPS, (len(pairs),), generator=fixed).to(pairs.device)
        made = bjd.passes(pairs, times, bjd.clean_parts(self.options.conditional, self._step))
        text = self.known.text(places).repeat(made.passes, 1, 1)
        owners = tasks.repeat(made.passes) if self.options.adapters else None
        return bjd.losses(self.network(made.inputs, made.times, text, owners), made)

    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs ``(N, C + 1, H, W)`` from -1 to 1, rows of their prompts ``(N,)``, and their tasks ``(N,)``."""
        found = []
        *earlier, present = self.cards
        for number, one in enumerate((present, *earlier)):
            part = batch.of(number)
            if not len(part.images):
                continue
            codes = codecs.to_local(part.labels, one.ids)
            shown = codecs.subsets(codes, one.classes)
            named = shown
            if number and "full_prompts" in self.compat:
                named = torch.full_like(shown, 1 << one.classes)
            pair = torch.cat([self._image_in(part.images, one), self._mask_in(codes, one)], 1)
            # an image without mask teaches nothing of how the two belong together
            chosen = shown > 0 if self.options.empty == "drop" and bool(shown.any()) else shown >= 0
            found.append(
                (pair[chosen], self.known.places(one, named[chosen]), torch.full_like(named[chosen], one.index))
            )
        pairs, places, tasks = (torch.cat(parts) for parts in zip(*found, strict=True))
        return pairs, places, tasks

    def _image_in(self, images: Tensor, one: Card) -> Tensor:
        if "minmax_images" in self.compat:
            return codecs.stretched(images)
        return codecs.encode_image(images, one.ends)

    def _mask_in(self, codes: Tensor, one: Card) -> Tensor:
        if "minmax_masks" in self.compat:
            return codecs.stretched(codes)[:, None]
        return codecs.encode_mask(codes, one.classes)

    def _optimizer(self) -> Optimizer:
        """AdamW; the scales of the adapters do not decay, and adapters have an epsilon of their own."""
        self._step = int(self.iteration)  # of a phase that goes on
        options, parts = self.options, self.network.parameter_groups()
        settings = {
            "unet": {"weight_decay": options.weight_decay},
            "adapters": {"weight_decay": options.weight_decay, "eps": options.adapter_eps},
            "gammas": {"weight_decay": 0.0, "eps": options.adapter_eps},
        }
        groups = [{"params": found, **settings[part]} for part, found in parts.items() if found]
        return AdamW(groups, lr=options.lr)

    def _count_step(self, step: int) -> None:
        self._step = step + 1
        self.iteration.fill_(step + 1)

    # Pairs ----------------------------------------------------------------------------------------------------

    def _real_images(self, one: Card, task: Task, judge: Judge) -> RealImages | None:
        """The images that a task's first pairs are compared with, read when the first file is made."""
        if not self.pairs.check_copies or one.index != task.index:
            return None
        if self._real is None:
            self._real = RealImages(task.train(), one.ends, judge.features)
        return self._real

    def _make(
        self, one: Card, stage: int, index: int, progress: Progress, judge: Judge, real: RealImages | None
    ) -> dict[str, Tensor]:
        """File ``index`` of the pairs of a task, without copies of ``real`` images."""
        device, number = self.iteration.device, min(self.pairs.batch, self.pairs.count - index * self.pairs.batch)
        chosen = self.known.draw(one, number)
        if "full_prompts" in self.compat:
            chosen = torch.full_like(chosen, 1 << one.classes)
        height, width = self.known.sides[one.index].tolist()
        # drawn on the CPU, so that a seed gives the same pairs on every device
        start = torch.randn(number, len(one.ends[0]) + 1, height, width).to(device)
        text = self.known.text(self.known.places(one, chosen.to(device)))
        tasks = torch.full((number,), one.index, device=device) if self.options.adapters else None
        precision = self.options.precision
        made = denoise(self.network, start, text, tasks, self.pairs.sampler, self.pairs.steps, precision, progress)
        images, codes = self._decoded(made, one)
        shown = codecs.from_bytes(images, one.ends)  # as it is stored, because the next task trains on that
        seen = codecs.to_local(judge.labels(shown).cpu(), one.ids)
        fits = agreement(codes, seen, one.classes)
        if self.pairs.labels == "seen":
            codes = seen
        passed = sound(codes, self.known.areas_of(one))
        keep = passed if self.pairs.gate else torch.ones_like(passed)
        keep = keep & (fits >= self.pairs.least_fit)
        found = None if real is None else real.check(shown)
        if found is not None:
            keep = keep & ~found.copies
        manifest = Manifest(
            stage=stage,
            task=one.index,
            file=index,
            generator=self.stock.digests[stage].cpu(),
            codec=codecs.VERSION,
            subsets=chosen[keep],
            histogram=torch.bincount(codes[keep].flatten(), minlength=one.classes + 1),
            tried=number,
            sound=int(passed.sum()),
            fit=float(fits.mean()),
        )
        if found is not None and real is not None:
            nearest = found.distances.amin(0)
            manifest = manifest._replace(copies=int(found.copies.sum()), nearest=nearest, limits=real.limits)
        return {"images": images[keep], "labels": codes[keep].to(torch.uint8), **manifest.tensors()}

    def _decoded(self, made: Tensor, one: Card) -> tuple[Tensor, Tensor]:
        """Images uint8 ``(N, C, H, W)`` and local codes ``(N, H, W)`` int64 of what the network made, on the CPU."""
        images, mask = made[:, :-1], made[:, -1:]
        if bool(self.known.grey[one.index]) and self.pairs.grey:
            images = images.mean(1, keepdim=True).expand_as(images)
        if "minmax_images" in self.compat:
            images = codecs.stretched(images)
        if "minmax_masks" in self.compat:
            mask = codecs.stretched(mask)
        classes = self.cards[-1].classes if "current_classes" in self.compat else one.classes
        codes = codecs.decode_mask(mask, classes)
        if self.pairs.majority:
            codes = codecs.majority(codes, classes)
        return codecs.to_bytes(images).cpu(), codes.clamp_max(one.classes).cpu()

    # The ledger -----------------------------------------------------------------------------------------------

    def kept(self, prefix: str) -> list[Kept]:
        """What crosses the task boundary besides weights; ``prefix`` is where this part is in its owner, with a dot."""
        encoder = "CLIP's frozen text encoder" if self.options.text == "clip" else "a stand-in for a text encoder"
        text = f"{encoder}, from the prompts alone: names of tasks and classes"
        counts = [f"{prefix}known.{name}" for name in knowledge.COUNTS]
        counts += [f"{prefix}stock.{name}" for name in stock.COUNTS]
        return [
            Kept("prompts", "statistics", (f"{prefix}known.texts",), text),
            Kept(
                "mask-counts",
                "statistics",
                (*counts, f"{prefix}iteration"),
                "how often training masks show which classes and how large, the size of images, and whether they are "
                "grey; how many generated pairs look sound; hashes of the generator",
            ),
            *self.stock.kept(f"{prefix}stock.", self.cards),
        ]
