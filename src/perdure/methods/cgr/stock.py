"""The stored pairs of all tasks: which files hold them, who may read them, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from perdure.data.tensors import FileSamples
from perdure.engine.state import Stateful
from perdure.errors import PerdureError
from perdure.files import read_tensors
from perdure.kept.items import Kept
from perdure.kept.method_state import hash_of
from perdure.methods.cgr.options import PairOptions
from perdure.methods.cgr.pairs import StoredPairs, check_causality, check_content, read_manifest
from perdure.methods.cgr.prompts import Card
from perdure.streams.task import Task

COUNTS: Final = ("yields", "fits", "nearness", "digests", "replayed")
_PREFIX: Final = "pairs-"


class PairStock(nn.Module):
    """Counts of the pairs of all tasks so far; the pairs are files of the owner.

    ``yields (T, 3)`` int64 counts pairs made, those that passed the checks of masks, and those stored; ``fits (T, 1)``
    float32 is the Dice of their masks with what the segmenter sees in their images; ``nearness
    (T, 5)`` float32 says of the first pairs of a task how many were copies, how near the others came to real images by
    two distances, and their limits; ``digests (T, 32)`` uint8 is the hash of the generator after each task; ``replayed
    ()`` int64 counts the pairs that the present task trains on. ``previews (K, n, C, H, 2 W)`` uint8 are shown.

    Args:
        options: What is made and kept.
    """

    yields: Tensor
    fits: Tensor
    nearness: Tensor
    digests: Tensor
    replayed: Tensor
    previews: Tensor | None

    def __init__(self, options: PairOptions) -> None:
        super().__init__()
        self.options = options
        self.register_buffer("yields", torch.zeros(0, 3, dtype=torch.int64))
        self.register_buffer("fits", torch.zeros(0, 1))
        self.register_buffer("nearness", torch.zeros(0, 5))
        self.register_buffer("digests", torch.zeros(0, 32, dtype=torch.uint8))
        self.register_buffer("replayed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("previews", None)

    def key(self, one: Card, now: int) -> str:
        """Name among the owner's files of the pairs of a task that are there after stage ``now``."""
        return f"{_PREFIX}{self.stage(one, now):02d}-{one.index:02d}"

    def stage(self, one: Card, now: int) -> int:
        """The stage at whose end they were made."""
        return one.index if self.options.source == "first" else now

    def past(
        self, owner: Stateful, task: Task, cards: Sequence[Card], sides: Sequence[Sequence[int]]
    ) -> list[FileSamples]:
        """Pairs of each earlier task, in task order, for training on ``task``. ``sides``: height and width of each.

        Raises:
            DataError: A file was not made at the end of an earlier task by this run's generator, or holds no pairs.
        """
        sources = []
        for one in cards[: task.index]:
            paths = owner.store.paths(owner.files[self.key(one, task.index - 1)])
            check_causality([read_manifest(path) for path in paths], one.index, task.index, self.digests)
            black, white = (tuple(end) for end in one.ends)
            for path in paths:
                check_content(path, len(black), one.classes, sides[one.index])
            shown = StoredPairs(channels=len(black), black=black, white=white, ids=one.ids, axes=one.mirrors)
            sources.append(FileSamples(paths, shown))
        return sources

    def sign(self, generator: nn.Module, task: int) -> None:
        """Note the hash of the trained generator, which pairs name, and how many pairs it has learned from."""
        weights = torch.cat([p.detach().flatten() for p in generator.parameters()])
        digest = torch.tensor(list(bytes.fromhex(hash_of(weights))), dtype=torch.uint8)
        self.digests = torch.cat([self.digests[:task], digest[None].to(self.digests)])
        self.replayed = self.yields[:task, 2].sum()

    def take(self, one: Card, paths: Sequence[Path], now: int) -> None:
        """Count how many pairs of a task were made and kept, and how near the first ones came to real images.

        Raises:
            PerdureError: No pair was stored: later tasks would have no past.
        """
        found = [read_manifest(path) for path in paths]
        check_causality(
            found, one.index, now + 1, self.digests
        )  # files may have been exchanged while the run stood still
        numbers = [sum(m.tried for m in found), sum(m.sound for m in found), sum(len(m.subsets) for m in found)]
        fit = sum(m.fit * m.tried for m in found) / max(1, numbers[0])
        if not numbers[2]:
            copies = sum(m.copies for m in found)
            ways = ["more method.generator.steps"]
            ways += ["method.pairs.gate=false"] if self.options.gate else []
            ways += ["a lower method.pairs.least_fit"] if self.options.least_fit else []
            raise PerdureError(
                f"none of {numbers[0]} pairs generated for task '{one.name}' was fit to be stored: {numbers[1]} passed "
                f"the checks of their masks, masks fit images with a mean Dice of {100 * fit:.0f} %, {copies} were "
                "copies of real images",
                f"begin a new run with {' or '.join(ways)}; a data set that was added to a run is taken out of it "
                "again by `perdure add RUN --give-up`",
            )
        self.yields = _with_row(self.yields, now + 1, one.index, numbers)
        self.fits = _with_row(self.fits, now + 1, one.index, [fit])
        if one.index == now and self.options.check_copies:
            nearest = torch.stack([m.nearest for m in found]).amin(0)
            row = [float(sum(m.copies for m in found)), *nearest.tolist(), *found[0].limits.tolist()]
            self.nearness = _with_row(self.nearness, now + 1, one.index, row)

    def finish(self, owner: Stateful, task: Task, cards: Sequence[Card], size: Sequence[int]) -> None:
        """Let go of the pairs that the newest ones replace, and choose some to show. ``size``: height and width."""
        wanted = {self.key(one, task.index) for one in cards}
        owner.files = {
            name: files for name, files in owner.files.items() if name in wanted or not name.startswith(_PREFIX)
        }
        if self.options.previews:
            self.previews = self._shown(owner, task, cards, size).to(self.yields.device)

    def _shown(self, owner: Stateful, task: Task, cards: Sequence[Card], size: Sequence[int]) -> Tensor:
        """Image and mask side by side, per class; black where there are too few, or images of another size."""
        count, channels = self.options.previews, len(cards[-1].ends[0])
        shown = torch.zeros(len(task.seen), count, channels, size[0], 2 * size[1], dtype=torch.uint8)
        for one in cards:
            names = owner.files[self.key(one, task.index)]
            files = [read_tensors(path, ("images", "labels")) for path in owner.store.paths(names[:count])]
            images, codes = (torch.cat([file[key] for file in files]) for key in ("images", "labels"))
            masks = (codes.float() * (255 / one.classes)).to(torch.uint8)[:, None].expand_as(images)
            both = torch.cat([images, masks], 3)
            if both.shape[2:] != shown.shape[3:]:
                continue
            for code, class_id in enumerate(one.ids, 1):
                some = both[(codes == code).flatten(1).any(1)][:count]
                shown[task.seen.index(class_id), : len(some)] = some
        return shown

    def kept(self, prefix: str, cards: Sequence[Card]) -> list[Kept]:
        """The pairs of each task, and those that are shown."""
        now, items = len(cards) - 1, []
        what = ("image-mask pairs", "")
        if self.options.labels == "seen":
            what = ("images", ", with masks that the segmenter saw in them")
        for one in cards[: len(self.yields)]:
            made, passed, stored = self.yields[one.index].tolist()
            fit = float(self.fits[one.index])
            items.append(
                Kept(
                    f"{_PREFIX}{one.name}",
                    "synthetic",
                    (),
                    f"{what[0]} that the generator made after task {self.stage(one, now) + 1} from noise and prompts"
                    f"{what[1]}; of {made} made, {passed} passed the checks of their masks and {stored} were stored; "
                    f"with what the segmenter sees in the images, the generated masks have a Dice of {100 * fit:.0f} %"
                    f"{self._told(one)}",
                    files=self.key(one, now),
                )
            )
        if self.previews is not None:
            each = [
                f"{one.name} {100 * float(self.fits[one.index]):.0f} ({passed} of {made})"
                for one, (made, passed, _) in zip(cards, self.yields.tolist(), strict=False)
            ]
            text = (
                "generated pairs, image and mask side by side, of each class; shown in the report. Dice of all "
                "generated masks, in %, with what the segmenter sees in the images (and how many pass the checks): "
                f"{', '.join(each)}"
            )
            items.append(Kept("previews", "synthetic", (f"{prefix}previews",), text, shows="images"))
        return items

    def _told(self, one: Card) -> str:
        """How near the first pairs of a task came to its real images, in words."""
        if len(self.nearness) <= one.index or not self.nearness[one.index].any():
            return ""
        copies, pixels, features, most_pixels, most_features = self.nearness[one.index].tolist()
        if not most_features:
            return (
                f"; too few patients to tell how alike they are: only the same images count as copies, {copies:.0f} "
                "were left out when the task was learned"
            )
        return (
            f"; when the task was learned, {copies:.0f} were left out as copies of real images: the nearest was at "
            f"{pixels:.3f} grey values and {features:.2g} of features, copies lie below {most_pixels:.3f} or "
            f"{most_features:.2g}"
        )


def _with_row(table: Tensor, length: int, place: int, row: Sequence[float]) -> Tensor:
    """A table of ``length`` rows with one of them replaced; those that it lacks are 0."""
    longer = table.new_zeros(length, table.shape[1])
    longer[: len(table)] = table[:length]
    longer[place] = table.new_tensor(row)
    return longer
