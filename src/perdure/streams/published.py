"""Published numbers of images per step, and their comparison with our image lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import NamedTuple, NotRequired, TypedDict

from perdure.errors import DataError, UsageError, nearest


class Comparison(NamedTuple):
    """One number of images: ``split`` is ``train``, ``validation`` or ``test``; ``step`` counts from 0."""

    step: int
    split: str
    published: int
    ours: int
    ok: bool


class Entry(TypedDict):
    """Images per step of one split: of ``train`` by setting; what is not published is left out."""

    train: NotRequired[dict[str, list[int]]]
    validation: NotRequired[list[int]]
    test: NotRequired[list[int]]


class ClassOrder(TypedDict):
    """Published splits under another class order."""

    splits: dict[str, Entry]


class Published(TypedDict):
    """All that is published of a data set, as its file in ``streams/published`` holds it."""

    dataset: str
    classes: int
    images: dict[str, int]
    splits: dict[str, Entry]
    orders: NotRequired[dict[str, ClassOrder]]
    left_out: NotRequired[list[int]]


def datasets() -> list[str]:
    """Names of the data sets with published counts."""
    folder = resources.files(__package__) / "published"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def published(dataset: str) -> Published:
    """All published counts of a data set: images, splits, orders. Raises UsageError if there are none."""
    if dataset not in datasets():
        raise UsageError(f"no counts are published for data set '{dataset}'", nearest(dataset, datasets()))
    text = (resources.files(__package__) / "published" / f"{dataset}.json").read_text(encoding="utf-8")
    content: Published = json.loads(text)
    return content


def published_counts(dataset: str, split_name: str, setting: str, order: str = "natural") -> dict[str, list[int]]:
    """Images per step of ``train``, ``validation`` and ``test``, as far as published.

    Args:
        dataset: Name of the data set, e.g. ``"voc"``.
        split_name: Published name of the split, e.g. ``"15-1"``.
        setting: ``overlap``, ``disjoint`` or ``partition``.
        order: ``natural``, or the name of a published class order.
    """
    if dataset not in datasets():
        return {}
    content = published(dataset)
    other = content.get("orders", {}).get(order)
    splits = content["splits"] if order == "natural" else other["splits"] if other else {}
    entry = splits.get(split_name, Entry())
    known = {
        "train": entry.get("train", {}).get(setting),
        "validation": entry.get("validation"),
        "test": entry.get("test"),
    }
    return {split: list(counts) for split, counts in known.items() if counts}


def compare_counts(
    ours: Mapping[str, Sequence[int] | None],
    dataset: str,
    split_name: str,
    setting: str,
    order: str = "natural",
) -> list[Comparison]:
    """Compare numbers of images with the published ones, step by step.

    Args:
        ours: Images per step of ``train``, ``validation`` and ``test``, see
            :func:`perdure.streams.summary.list_sizes`; a missing or None entry is not compared.
        dataset: See :func:`published_counts`.
        split_name: See :func:`published_counts`.
        setting: See :func:`published_counts`.
        order: See :func:`published_counts`.

    Returns:
        One row per number; empty if nothing is published.

    Raises:
        DataError: The number of steps differs.
    """
    rows: list[Comparison] = []
    for split, known in published_counts(dataset, split_name, setting, order).items():
        sizes = ours.get(split)
        if sizes is None:
            continue
        if len(sizes) != len(known):
            raise DataError(
                f"{dataset} {split_name} has {len(known)} published steps, but {len(sizes)} here",
                "compare a stream with the same split",
            )
        rows += [Comparison(step, split, k, s, k == s) for step, (k, s) in enumerate(zip(known, sizes, strict=True))]
    return rows


def published_left_out(dataset: str) -> list[int] | None:
    """Zero-based positions, in lexicographic name order, of training images outside every step of the partition.

    None if no partition is published.
    """
    return published(dataset).get("left_out") if dataset in datasets() else None
