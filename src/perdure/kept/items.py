"""What a method may keep of the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeptKind = Literal["weights", "statistics", "prototypes", "synthetic", "exemplars", "preview"]


@dataclass(frozen=True)
class Kept:
    """One thing that crosses a task boundary, described for the ledger: buffers, files, or both.

    Args:
        name: File name without suffix, e.g. ``"statistics"``.
        kind: What sort of thing it is. ``exemplars`` are raw training samples.
        keys: Names of the method's buffers that hold it (entries of ``state_dict()``).
        made_from: One plain sentence: from which data, by which computation.
        per_class: True if its bytes grow with the number of classes (the ledger then shows bytes per class).
        shows: How the report shows its buffers. ``images``: each tensor is uint8 ``(K, C, H, W)`` or
            ``(K, n, C, H, W)``, row k of the k-th class learned. ``distances``: see
            :mod:`perdure.methods.ccsi.memorisation`.
        files: Name in the method's ``files`` of the stored files that hold it.
        from_images: Of statistics that look like images (class means): the least number of training images that any
            class of the present task was averaged from. A mean of few images of a patient is that patient's image.
    """

    name: str
    kind: KeptKind
    keys: tuple[str, ...]
    made_from: str
    per_class: bool = False
    shows: Literal["images", "distances"] | None = None
    files: str | None = None
    from_images: int | None = None
