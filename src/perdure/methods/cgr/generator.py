"""The generator of pairs as a part that a method owns: it learns each task, and makes pairs of all tasks at its end.

CGR trains its segmenter on these pairs. So may any other method that trains on a mix of sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.data.tensors import FileSamples
from perdure.engine.phases import Collect, Generate, Phase, Progress, Terms, Train
from perdure.engine.state import Stateful
from perdure.errors import PerdureError, UsageError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.kept.method_state import hash_of
from perdure.methods.cgr import bjd, codecs
from perdure.methods.cgr.copies import Features, RealImages
from perdure.methods.cgr.options import Defect, GeneratorOptions, PairOptions
from perdure.methods.cgr.pairs import Manifest, StoredPairs, check_causality, mixed, read_manifest
from perdure.methods.cgr.prompts import Card, card, draw_subsets, rows
from perdure.methods.cgr.sampling import BINS, area_bins, denoise, sound
from perdure.networks.joint_diffusion.network import JointDiffusion
from perdure.networks.joint_diffusion.text import clip_embeddings, hash_embeddings
from perdure.streams.task import Task

LOOKS: Final = 256
"""Least number of training samples that a task's statistics are taken from: of volumes, each one is a random slice."""
TABLES: Final = ("subsets", "areas", "sides", "grey", "yields", "nearness", "digests", "replayed", "iteration")


class PairGenerator(nn.Module):
    """A joint diffusion network, the prompts of each task, and a few counts of its masks.

    Tables over tasks: ``subsets (R,)`` int64, how often each set of classes was seen; ``texts (R, T · width)`` float16,
    the embedded prompts; ``areas (ΣC, 64)`` int64, areas by size; ``sides (T, 2)`` int64, height and width; ``grey
    (T,)`` bool; ``yields (T, 3)`` int64, pairs made, those that passed the gate and those stored; ``nearness (T, 5)``
    float32, of the first pairs: copies left out, least distances to real images and their limits; ``digests (T, 32)``
    uint8, hash of the generator after each task; ``replayed ()`` int64, pairs that the present task trains on. A task
    with C classes has 2ᶜ + 1 rows R: its subsets, and the published full prompt.

    Args:
        options: Of the network and its training.
        pairs: Of what it makes.
        channels: Channels of the images.
        compat: Published defects to bring back.
    """

    subsets: Tensor
    texts: Tensor
    areas: Tensor
    sides: Tensor
    grey: Tensor
    yields: Tensor
    nearness: Tensor
    digests: Tensor
    replayed: Tensor
    iteration: Tensor
    previews: Tensor | None

    def __init__(
        self, options: GeneratorOptions, pairs: PairOptions, channels: int, compat: Sequence[Defect] = ()
    ) -> None:
        super().__init__()
        self.options, self.pairs, self.compat = options, pairs, frozenset(compat)
        self.network = JointDiffusion(
            channels, options.text_width, size=options.size, checkpointing=options.checkpointing
        )
        self.cards: list[Card] = []
        tokens = options.tokens if options.text == "hash" else 77
        for name, shape, kind in (
            ("subsets", (0,), torch.int64),
            ("texts", (0, tokens * options.text_width), torch.float16),
            ("areas", (0, BINS), torch.int64),
            ("sides", (0, 2), torch.int64),
            ("grey", (0,), torch.bool),
            ("yields", (0, 3), torch.int64),
            ("nearness", (0, 5), torch.float32),
            ("digests", (0, 32), torch.uint8),
            ("replayed", (), torch.int64),
            ("iteration", (), torch.int64),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind))
        self.register_buffer("previews", None)
        self._step = 0
        self._real: RealImages | None = None  # while pairs are made

    def begin(self, task: Task) -> None:
        """Write the task's card and append its adapter."""
        options = self.options
        self.cards = [*self.cards[: task.index], card(task, options.prefixes, options.phrases)]
        self.iteration = torch.zeros_like(self.iteration)
        if options.adapters:
            self.network.add_adapter(options.gamma)
            last = len(self.network.adapters) - 1
            for number, adapter in enumerate(self.network.adapters):
                old = options.freeze_past_adapters and number < last
                adapter.requires_grad_("frozen_adapters" not in self.compat and not old)

    # Phases ---------------------------------------------------------------------------------------------------

    def learn(self, owner: Stateful, task: Task) -> list[Phase]:
        """Count what the task's masks show, then train the generator on the task and on generated pairs."""
        options, later = self.options, task.index > 0
        if options.text == "clip" and options.text_folder is None:
            raise UsageError("text=clip needs the folder of a text encoder", "set method.generator.text_folder=DIR")
        if task.preparation.patch:
            self.network.check_size(task.preparation.patch)

        def looks() -> Batches:
            samples = task.train()
            even = torch.ones(len(samples))
            return Batches(samples, 8, drop_last=False, weights=even, draws=max(LOOKS, len(samples)))

        def data() -> Batches | Mix:
            return mixed(task, self.past(owner, task), options.batch_size)

        steps = (options.later_steps or options.steps) if later else options.steps
        return [
            Collect("labels", self, looks, self._measure, self._keep),
            Train(
                name="generator",
                module=self.network,
                loss=self.loss,
                optimizer=self._optimizer,
                data=data,
                steps=steps,
                clip=options.clip,
                ema=options.ema,
                precision=options.precision,
                after_step=self._count_step,
                finish=self._sign,
            ),
        ]

    def generate(self, owner: Stateful, task: Task, features: Features) -> list[Phase]:
        """Make pairs of every task so far, or of this one alone where earlier ones keep their first pairs.

        Args:
            owner: Whose files they become.
            task: The task under way.
            features: See :class:`~perdure.methods.cgr.copies.RealImages`.
        """
        chosen = self.cards[-1:] if self.pairs.source == "first" else self.cards
        count = -(-self.pairs.count // self.pairs.batch)
        phases: list[Phase] = []
        for one in chosen:

            def make(index: int, progress: Progress, one: Card = one) -> Mapping[str, Tensor]:
                real = None
                if self.pairs.check_copies and one.index == task.index:
                    if self._real is None:
                        self._real = RealImages(task.train(), one.ends, features)
                    real = self._real
                return self._make(one, task.index, index, progress, real)

            def finish(paths: Sequence[Path], one: Card = one, last: bool = one is chosen[-1]) -> None:
                self._real = None
                self._take(one, paths)
                if last:
                    self._finish(owner, task)

            phases.append(Generate("pairs", self, count, make, finish, self._key(task.index, one.index)))
        return phases

    def past(self, owner: Stateful, task: Task) -> list[FileSamples]:
        """Generated pairs of each earlier task, in task order, for training on ``task``.

        Raises:
            DataError: A file was not made at the end of an earlier task by this run's generator.
        """
        sources = []
        for one in self.cards[: task.index]:
            stage = one.index if self.pairs.source == "first" else task.index - 1
            paths = owner.store.paths(owner.files[self._key(stage, one.index)])
            check_causality([read_manifest(path) for path in paths], task.index, self.digests)
            black, white = (tuple(end) for end in one.ends)
            shown = StoredPairs(channels=len(black), black=black, white=white, ids=one.ids)
            samples = FileSamples(paths, shown)
            if not len(samples):
                raise PerdureError(
                    f"none of the pairs generated for task '{one.name}' was fit to be stored",
                    "train the generator longer (method.generator.steps), or set method.pairs.gate=false",
                )
            sources.append(samples)
        return sources

    # The loss -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Terms:
        """L_BJ of real pairs and of generated ones (spec CGR 2.2)."""
        pairs, places, tasks = self._encoded(batch)
        if "frozen_timesteps" in self.compat and len(self.cards) > 1:
            fixed = torch.Generator().manual_seed(0)
            times = torch.randint(1000, (len(pairs),), generator=fixed).to(pairs.device)
        else:
            times = bjd.draw_times(len(pairs), pairs.device)
        made = bjd.passes(pairs, times, bjd.clean_parts(self.options.conditional, self._step))
        text = self._text(places).repeat(made.count, 1, 1)
        owners = tasks.repeat(made.count) if self.options.adapters else None
        return bjd.losses(self.network(made.inputs, made.times, text, owners), made)

    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs ``(N, C + 1, H, W)`` from -1 to 1, rows of their prompts ``(N,)``, and their tasks ``(N,)``."""
        found = []
        starts = rows(self.cards)
        for number, one in enumerate((self.cards[-1], *self.cards[:-1])):
            part = batch.of(number)
            if not len(part.images):
                continue
            codes = codecs.to_local(part.labels, one.ids)
            shown = codecs.subsets(codes, one.classes)
            place = shown if not (number and "full_prompts" in self.compat) else shown * 0 + (1 << one.classes)
            pair = torch.cat([self._image_in(part.images, one), self._mask_in(codes, one)], 1)
            if self.options.empty == "drop" and bool(shown.any()):
                pair, place = pair[shown > 0], place[shown > 0]
            found.append((pair, starts[one.index] + place, torch.full_like(place, one.index)))
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

    def _text(self, places: Tensor) -> Tensor:
        return self.texts[places].float().view(len(places), -1, self.options.text_width)

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

    def _sign(self) -> None:
        """Note the hash of the generator as it is now, which pairs name, and how many pairs it has learned from."""
        self.replayed = self.yields[: len(self.cards) - 1, 2].sum()
        digest = bytes.fromhex(hash_of(torch.cat([p.detach().flatten() for p in self.network.parameters()])))
        self.digests = self._appended("digests", torch.tensor(list(digest), dtype=torch.uint8)[None])

    # What a task's masks show ---------------------------------------------------------------------------------

    def _measure(self, batch: Batch) -> dict[str, Tensor]:
        one, images = self.cards[-1], batch.images
        codes = codecs.to_local(batch.labels, one.ids)
        shown = codecs.subsets(codes, one.classes)
        return {
            "subsets": torch.bincount(shown, minlength=(1 << one.classes) + 1),
            "areas": area_bins(codes, one.classes),
            "colour": (images - images.mean(1, keepdim=True)).abs().sum().double(),
            "sides": torch.tensor(images.shape[2:], device=images.device) * len(images),
            "images": torch.tensor(len(images), device=images.device),
        }

    def _keep(self, sums: dict[str, Tensor]) -> None:
        one, options, counts = self.cards[-1], self.options, sums["subsets"].clone()
        if options.empty == "drop":
            counts[0] = 0
        if not int(counts.sum()):
            raise PerdureError(
                f"task '{one.name}': no training image shows a class that it annotates", "check its masks"
            )
        self.subsets = self._appended("subsets", counts)
        self.areas = self._appended("areas", sums["areas"])
        self.sides = self._appended("sides", (sums["sides"] // sums["images"])[None])
        self.grey = self._appended("grey", (sums["colour"] < 1e-3 * sums["images"])[None])
        prompts = [*one.prompts(), one.full_prompt()]
        if options.text == "hash":
            text = hash_embeddings(prompts, options.text_width, options.tokens)
        else:
            assert options.text_folder is not None
            text = clip_embeddings(prompts, options.text_folder, options.text_width)
        self.texts = self._appended("texts", text.flatten(1).half())

    def _appended(self, name: str, more: Tensor) -> Tensor:
        """A table with rows of the present task in the place of what it holds beyond earlier tasks."""
        before = self.cards[:-1]
        kept = {
            "subsets": rows(before)[-1],
            "texts": rows(before)[-1],
            "areas": sum(one.classes for one in before),
        }.get(name, len(before))
        table = self.get_buffer(name)
        return torch.cat([table[:kept], more.to(table)])

    # Pairs ----------------------------------------------------------------------------------------------------

    def _make(
        self, one: Card, stage: int, index: int, progress: Progress, real: RealImages | None
    ) -> dict[str, Tensor]:
        """File ``index`` of the pairs of a task, without copies of ``real`` images."""
        options, device, first = self.pairs, self.subsets.device, rows(self.cards)[one.index]
        number = min(options.batch, options.count - index * options.batch)
        full = 1 << one.classes
        chosen = draw_subsets(self.subsets[first : first + full], number)
        if "full_prompts" in self.compat:
            chosen = torch.full_like(chosen, full)
        height, width = self.sides[one.index].tolist()
        # drawn on the CPU, so that a seed gives the same pairs on every device
        start = torch.randn(number, len(one.ends[0]) + 1, height, width).to(device)
        text = self._text(chosen.to(device) + first)
        tasks = torch.full((number,), one.index, device=device) if self.options.adapters else None
        made = denoise(
            self.network, start, text, tasks, options.sampler, options.steps, self.options.precision, progress
        )
        images, codes = self._decoded(made, one)
        passed = sound(codes, self._areas(one))
        keep = passed if options.gate else torch.ones_like(passed)
        found = None if real is None else real.check(codecs.from_bytes(images, one.ends))
        if found is not None:
            keep = keep & ~found.copies
        manifest = Manifest(
            stage,
            one.index,
            index,
            self.digests[stage].cpu(),
            codecs.VERSION,
            chosen[keep],
            torch.bincount(codes[keep].flatten(), minlength=one.classes + 1),
            number,
            int(passed.sum()),
        )
        if found is not None and real is not None:
            nearest = found.distances.amin(0)
            manifest = manifest._replace(copies=int(found.copies.sum()), nearest=nearest, limits=real.limits)
        return {"images": images[keep], "labels": codes[keep].to(torch.uint8), **manifest.tensors()}

    def _decoded(self, made: Tensor, one: Card) -> tuple[Tensor, Tensor]:
        """Images uint8 ``(N, C, H, W)`` and local codes ``(N, H, W)`` int64 of what the network made, on the CPU."""
        images, mask = made[:, :-1], made[:, -1:]
        if bool(self.grey[one.index]) and self.pairs.grey:
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

    def _areas(self, one: Card) -> Tensor:
        first = sum(before.classes for before in self.cards[: one.index])
        return self.areas[first : first + one.classes]

    def _take(self, one: Card, paths: Sequence[Path]) -> None:
        """Count how many pairs of a task were made and kept, and how near they came to real images."""
        found = [read_manifest(path) for path in paths]
        stored = sum(len(m.subsets) for m in found)
        self.yields = self._with_row("yields", one, [sum(m.tried for m in found), sum(m.sound for m in found), stored])
        if self.pairs.check_copies and one is self.cards[-1]:
            nearest = torch.stack([m.nearest for m in found]).amin(0)
            row = [float(sum(m.copies for m in found)), *nearest.tolist(), *found[0].limits.tolist()]
            self.nearness = self._with_row("nearness", one, row)

    def _with_row(self, name: str, one: Card, row: Sequence[float]) -> Tensor:
        """A table over tasks with a new row for one of them."""
        before = self.get_buffer(name)
        table = before.new_zeros(len(self.cards), before.shape[1])
        table[: len(before)] = before[: len(self.cards)]
        table[one.index] = before.new_tensor(row)
        return table

    def _finish(self, owner: Stateful, task: Task) -> None:
        """Let go of the pairs that the newest ones replace, and choose some to show."""
        wanted = {self._key(self._stage(one, task.index), one.index) for one in self.cards}
        owner.files = {name: files for name, files in owner.files.items() if name in wanted or name[:6] != "pairs-"}
        if self.pairs.previews:
            self.previews = self._shown(owner, task)

    def _shown(self, owner: Stateful, task: Task) -> Tensor | None:
        """Pictures of pairs per class, ``(K, n, C, H, 2 W)`` uint8: image and mask side by side."""
        count, channels = self.pairs.previews, len(self.cards[-1].ends[0])
        if len({tuple(side) for side in self.sides.tolist()}) > 1:
            return None
        height, width = self.sides[-1].tolist()
        shown = torch.zeros(len(task.seen), count, channels, height, 2 * width, dtype=torch.uint8)
        for one in self.cards:
            names = owner.files[self._key(self._stage(one, task.index), one.index)]
            files = [read_tensors(path, ("images", "labels")) for path in owner.store.paths(names[:count])]
            images, codes = (torch.cat([file[key] for file in files]) for key in ("images", "labels"))
            masks = (codes.float() * (255 / one.classes)).to(torch.uint8)[:, None].expand_as(images)
            both = torch.cat([images, masks], 3)
            for code, class_id in enumerate(one.ids, 1):
                some = both[(codes == code).flatten(1).any(1)][:count]
                shown[task.seen.index(class_id), : len(some)] = some
        return shown.to(self.subsets.device)

    def _stage(self, one: Card, now: int) -> int:
        return one.index if self.pairs.source == "first" else now

    @staticmethod
    def _key(stage: int, task: int) -> str:
        return f"pairs-{stage:02d}-{task:02d}"

    # The ledger -----------------------------------------------------------------------------------------------

    def kept(self, prefix: str, stage: int) -> list[Kept]:
        """What crosses the task boundary besides weights; ``prefix`` is where this part is in its owner, with a dot."""
        items = [
            Kept(
                "prompts",
                "statistics",
                (f"{prefix}texts",),
                "a frozen text encoder, from the prompts alone: names of tasks and classes",
            ),
            Kept(
                "mask-counts",
                "statistics",
                tuple(f"{prefix}{name}" for name in TABLES),
                "how often training masks show which classes and how large, the size of images, and whether they are "
                "grey; how many generated pairs look sound; hashes of the generator",
            ),
        ]
        for one in self.cards[: len(self.yields)]:
            made, passed, stored = self.yields[one.index].tolist()
            items.append(
                Kept(
                    f"pairs-{one.name}",
                    "synthetic",
                    (),
                    f"image-mask pairs that the generator made after task {self._stage(one, stage) + 1} from noise and "
                    f"prompts; of {made} made, {passed} passed the checks of their masks and {stored} were stored"
                    f"{self._told_nearness(one)}",
                    files=self._key(self._stage(one, stage), one.index),
                )
            )
        if self.previews is not None:
            text = "generated pairs, image and mask side by side, of each class; shown in the report"
            items.append(Kept("previews", "synthetic", (f"{prefix}previews",), text, shows="images"))
        return items

    def _told_nearness(self, one: Card) -> str:
        """How near the first pairs of a task came to its real images, in words."""
        if len(self.nearness) <= one.index or not self.nearness[one.index].any():
            return ""
        copies, pixels, features, most_pixels, most_features = self.nearness[one.index].tolist()
        return (
            f"; when the task was learned, {copies:.0f} were left out as copies of real images: the nearest was at "
            f"{pixels:.3f} grey values and {features:.2g} of features, copies lie below {most_pixels:.3f} or "
            f"{most_features:.2g}"
        )
