"""Built-in look-alikes of medical images: volumes of a torso in CT, and slices of heart, eye and prostate.

Nothing is read from disk and nobody was scanned: a case is drawn when it is asked for, and depends only on seed, kind,
set, source, size, split and number. ``perdure phantoms`` writes the same cases as nnU-Net raw folders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

from perdure.data.phantoms.cardiac import CLASSES as CARDIAC
from perdure.data.phantoms.cardiac import draw_cardiac
from perdure.data.phantoms.drawing import Scanner, scanner
from perdure.data.phantoms.fundus import CLASSES as FUNDUS
from perdure.data.phantoms.fundus import draw_fundus
from perdure.data.phantoms.prostate import CLASSES as PROSTATE
from perdure.data.phantoms.prostate import draw_prostate
from perdure.data.phantoms.slices import Slice
from perdure.data.phantoms.torso import CLASSES as TORSO
from perdure.data.phantoms.torso import SETS, Volume, draw_torso
from perdure.data.source import AbsentSplitError, Image, Kind, Mask, Source, Split, no_validation
from perdure.errors import DataError, UsageError, nearest
from perdure.labels import LabelSpace, label_space
from perdure.seeds import derive_seed

if TYPE_CHECKING:
    from perdure.data.case import Case

Phantom = Literal["torso", "cardiac", "fundus", "prostate"]
VERSION: Final = 1  # increase it when the same seed gives other pixels
COUNTS: Final[dict[int, tuple[int, int]]] = {3: (24, 8), 2: (120, 40)}
"""Training and test cases if none are asked for, by dimensions."""
LARGEST: Final[dict[int, int]] = {3: 256, 2: 1024}
_CACHE_BYTES: Final = 128 << 20  # drawn cases kept in memory per process


class Flat(NamedTuple):
    """A kind with two dimensions: its classes, how a case is drawn, and the name of its channel."""

    classes: tuple[str, ...]
    draw: Callable[[np.random.Generator, int, Scanner], Slice]
    channel: str


FLAT: Final[dict[str, Flat]] = {
    "cardiac": Flat(CARDIAC, draw_cardiac, "MRI"),
    "fundus": Flat(FUNDUS, draw_fundus, "green"),
    "prostate": Flat(PROSTATE, draw_prostate, "T2"),
}


@dataclass(frozen=True, eq=False)
class Phantoms(Source):
    """Cases of one kind; implements :class:`~perdure.data.source.Source`. Class ids count from 1 within the set.

    Args:
        phantom: What is shown.
        part: Set of the torso, which decides the labelled classes; empty for other kinds.
        counts: Cases per split.
        size: Height and width in pixels.
        scan: Number of the source; every number but 0 is another scanner with other patients.
        seed: Seed of the whole data set.
        complete: Label every structure of the torso, not those of the set alone.
    """

    phantom: Phantom
    part: str
    counts: dict[Split, int]
    size: int = 64
    scan: int = 0
    seed: int = 0
    complete: bool = False
    name: str = field(default="phantoms", init=False)
    kind: Kind = field(default="segmentation", init=False)
    space: LabelSpace = field(init=False)
    patients: bool = field(default=False, init=False)
    other_label: int = field(default=0, init=False)
    dims: Literal[2, 3] = field(init=False)
    modality: tuple[str, ...] = field(init=False)
    _cases: dict[tuple[Split, str], Volume | Slice] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        flat = FLAT.get(self.phantom)
        own = TORSO if self.complete else SETS.get(self.part, ())
        object.__setattr__(self, "space", label_space(flat.classes if flat else own, "organ"))  # the class is frozen
        object.__setattr__(self, "dims", 2 if flat else 3)
        object.__setattr__(self, "modality", (flat.channel if flat else "CT",))

    def names(self, split: Split) -> Sequence[str]:
        """``organs_000``, ``organs_001``, ... in training, ``organs_test_000``, ... in the test.

        No name is in both: in an nnU-Net raw folder the name is what tells cases apart.
        """
        if split == "val":
            raise no_validation("phantoms", "all cases are for training or for the test")
        if not self.counts[split]:
            raise AbsentSplitError(
                f"split '{split}' of phantoms is absent: 0 cases were asked for", f"set {split} above 0"
            )
        return tuple(f"{self._stem(split)}_{k:03d}" for k in range(self.counts[split]))

    def image(self, split: Split, name: str) -> Image:
        """Volume ``(1, D, H, W)`` float32 in Hounsfield units, or slice ``(1, H, W)`` uint8."""
        drawn = self._drawn(split, name)
        # a copy, so that nobody who writes to it changes the data
        return drawn.image[None].astype(np.float32 if isinstance(drawn, Volume) else np.uint8)

    def mask(self, split: Split, name: str) -> Mask:
        """Label map ``(D, H, W)`` or ``(H, W)`` int16: 0 background, place in the class list + 1."""
        drawn = self._drawn(split, name)
        if self.phantom != "torso":
            return drawn.label.astype(np.int16)
        table = np.zeros(len(TORSO) + 1, np.int16)
        for known in self.space.classes:
            table[TORSO.index(known.name) + 1] = known.id
        return table[drawn.label]

    def read(self, split: Split, name: str) -> Case:
        """A case with its spacing; a volume also has the place that a NIfTI file in RAS orientation gives it."""
        from perdure.data.case import Geometry  # here and not above: it loads torch

        drawn = self._drawn(split, name)
        geometry = Geometry(drawn.spacing, "mm")
        if isinstance(drawn, Volume):
            affine = np.diag([*drawn.spacing[::-1], 1.0])  # of a file, whose axes are (x, y, z)
            affine[:3, 3] = drawn.origin[::-1]
            turned = ((2, False), (1, False), (0, False))
            geometry = Geometry(drawn.spacing, "mm", tuple(map(float, affine.ravel())), turned)
        return replace(super().read(split, name), geometry=geometry)

    def fingerprint(self, split: Split) -> str:
        """Digest of the parameters and of the version of the drawing. No case is drawn."""
        parts = (VERSION, self.phantom, self.part, self.complete, self.scan, self.size, self.seed, split)
        return hashlib.blake2b(repr((*parts, len(self.names(split)))).encode(), digest_size=16).hexdigest()

    def _stem(self, split: Split) -> str:
        words = (self.part or self.phantom, f"scanner{self.scan}" if self.scan else "", "test" * (split == "test"))
        return "_".join(filter(None, words))

    def _drawn(self, split: Split, name: str) -> Volume | Slice:
        drawn = self._cases.get((split, name))
        if drawn is None:
            stem, _, digits = name.rpartition("_")
            number = int(digits) if digits.isascii() and digits.isdecimal() else -1
            known = split != "val" and stem == self._stem(split) and f"{number:03d}" == digits
            if not (known and 0 <= number < self.counts[split]):
                raise DataError(f"phantoms has no case '{name}' in split '{split}'")
            words = (self.seed, self.phantom, self.part, self.scan, self.size, split, number)
            rng = np.random.default_rng(derive_seed("phantoms", VERSION, *words))
            draw = FLAT[self.phantom].draw if self.phantom in FLAT else draw_torso
            drawn = draw(rng, self.size, scanner(self.phantom, self.scan))
            # all or nothing: an epoch reads cases in random order, so no case is a better one to drop
            if (len(self._cases) + 1) * (drawn.image.nbytes + drawn.label.nbytes) > _CACHE_BYTES:
                self._cases.clear()
            self._cases[split, name] = drawn
        return drawn

    def __getstate__(self) -> dict[str, object]:
        """Leave the drawn cases out when the source is sent to a worker process."""
        return self.__dict__ | {"_cases": {}}


def open_phantoms(
    kind: Phantom = "torso",
    set: str = "",  # noqa: A002  # an option of recipes
    train: int | None = None,
    test: int | None = None,
    size: int = 64,
    source: int = 0,
    seed: int = 0,
    labels: Literal["set", "all"] = "set",
) -> Phantoms:
    """Open phantoms. Nothing is drawn before a case is read.

    Args:
        kind: ``torso`` (CT, 3D); in 2D ``cardiac`` (MR), ``fundus`` (green channel), ``prostate`` (T2-weighted MR).
        set: Of the torso: ``organs`` (liver, spleen, kidneys), ``vessels`` (aorta, vena cava, vertebrae) or ``lesions``
            (liver lesion, lungs). Every case shows all structures, and those of its set are labelled. Not given:
            ``organs``.
        train: Training cases; 24 of the torso or 120 slices if not given.
        test: Test cases; 8 of the torso or 40 slices if not given.
        size: Height and width in pixels. A torso has three quarters as many slices.
        source: Another number is another scanner with other patients: less contrast, more noise, another spacing.
        seed: Another seed gives other patients.
        labels: ``all`` labels every structure of the torso, for comparison with training on partial labels.

    Raises:
        UsageError: An option is out of range, or does not fit the kind.
    """
    if kind != "torso" and set:
        raise UsageError(f"phantoms: set is '{set}', but {kind} has no sets", "leave set out, or choose kind: torso")
    part = (set or "organs") if kind == "torso" else ""
    if part and part not in SETS:
        raise UsageError(f"phantoms: unknown set '{part}'", nearest(part, SETS))
    dims = 3 if kind == "torso" else 2
    if not 32 <= size <= LARGEST[dims]:
        raise UsageError(f"phantoms: size is {size}", f"32 to {LARGEST[dims]} pixels for {kind}")
    default = COUNTS[dims]
    counts: dict[Split, int] = {
        "train": default[0] if train is None else train,
        "test": default[1] if test is None else test,
    }
    for name, value, most in (*((key, count, 9999) for key, count in counts.items()), ("source", source, 999)):
        if not 0 <= value <= most:
            raise UsageError(f"phantoms: {name} is {value}", f"0 to {most}")
    return Phantoms(kind, part, counts, size, source, seed, labels == "all")
