"""What frames the synthesis of an item: which layouts, which labels, which of the images are shown."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.errors import PerdureError
from perdure.labels import BACKGROUND, IGNORE
from perdure.methods.ccsi_seg import layouts
from perdure.methods.ccsi_seg.options import SynthesisOptions
from perdure.methods.ccsi_seg.state import Statistics
from perdure.methods.ccsi_seg.synthesis import Request, draw_shifts
from perdure.methods.ccsi_seg.terms import edge_band


def plan_item(statistics: Statistics, options: SynthesisOptions, old: int, index: int) -> Request:
    """Draw layouts and paint the start images of item ``index``; wanted classes take turns over all items.

    Uses torch's generator.

    Args:
        statistics: Of all classes so far.
        options: Of the synthesis.
        old: Number of old classes; they come first.
        index: Number of the item.

    Raises:
        PerdureError: None of the old classes was ever seen.
    """
    known = (statistics.regions[:old] > 0).nonzero()[:, 0]
    if not len(known):
        raise PerdureError(
            "no old class was ever seen, so there is nothing to make impressions of",
            "check the training masks, or set method.replay=none",
        )
    first = index * options.batch
    last = min(first + options.batch, options.per_class * old)
    wanted = known[torch.arange(first, last, device=known.device) % len(known)]
    height, width = statistics.size.tolist()
    looks = statistics.looks()
    recolor = options.start == "colors"
    ground = statistics.fresh_ground(len(wanted), textured=recolor)
    chosen = layouts.plan(looks, wanted, options.most_classes, (height, width))
    start, rows = layouts.paint(looks, chosen, ground, options.warp, recolor)
    start = start + options.noise * torch.randn_like(start)
    return Request(start, rows, draw_shifts(options, (height, width)))


def layout_labels(rows: Tensor, class_ids: Tensor, band: int) -> Tensor:
    """Global ids ``(N, H, W)`` of a layout's rows, 0 where there is no class and ignore within ``band`` of an edge."""
    ids = torch.cat([class_ids, class_ids.new_tensor([BACKGROUND])])  # row -1 is the last of these
    return torch.where(edge_band(rows, band), IGNORE, ids[rows])


def first_of_each(images: Tensor, labels: Tensor, class_ids: Sequence[int], count: int) -> Tensor:
    """The first ``count`` images that show each class ``(K, count, C, H, W)``; black where there are too few."""
    rows = []
    for class_id in class_ids:
        found = (labels == class_id).flatten(1).any(1).nonzero()[:count, 0]
        black = images.new_zeros(count - len(found), *images.shape[1:])
        rows.append(torch.cat([images[found], black]))
    return torch.stack(rows)
