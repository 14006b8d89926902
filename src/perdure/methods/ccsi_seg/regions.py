"""What training images say of a class: where it lies, how large and what it looks like, as sums over batches.

All pixels of a class in one image are one region. Its centre is the centroid and its radius the root of the mean
squared distance to it, which a few stray pixels hardly move. A *patch* is the square of REACH radii around the
centre, resampled to a fixed side. Sums are float64 or int64 and add over batches and processes.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

REACH: Final = 2.2
"""Half the side of a patch in radii: a disc takes 0.64 of it, a thin bar 0.79."""
LEAST: Final = 12
"""Regions of fewer pixels say nothing of a shape and are left out."""
CHUNK: Final = 64
"""Regions that are resampled at a time."""
FACTS: Final = 4
"""Numbers about a region: log fill, log radius, centre y, centre x."""


class Regions(NamedTuple):
    """I regions: image ``(I,)``, row ``(I,)``, centre y, x ``(I, 2)`` and radius ``(I,)`` in pixels, area ``(I,)``."""

    image: Tensor
    row: Tensor
    centre: Tensor
    radius: Tensor
    area: Tensor


def find_regions(rows: Tensor, classes: int) -> Regions:
    """Regions of at least LEAST pixels in rows ``(N, H, W)`` (−1: no class), by image, then row. float64."""
    images = len(rows)
    inside = rows >= 0
    image, y, x = inside.nonzero(as_tuple=True)
    place, cells = image * classes + rows[inside], images * classes
    y, x = y.double() + 0.5, x.double() + 0.5
    area = torch.bincount(place, minlength=cells).double()
    many = area.clamp_min(1.0)
    mean_y, mean_x = (torch.bincount(place, at, minlength=cells) / many for at in (y, x))
    spread = torch.bincount(place, y.square() + x.square(), minlength=cells) / many
    # + 1/6: the variance of a pixel's own square
    radius = (spread - mean_y.square() - mean_x.square() + 1 / 6).clamp_min(0.25).sqrt()
    found = (area >= LEAST).nonzero()[:, 0]
    centre = torch.stack([mean_y, mean_x], 1)
    return Regions(found // classes, found % classes, centre[found], radius[found], area[found])


def region_sums(images: Tensor, rows: Tensor, classes: int, side: int) -> dict[str, Tensor]:
    """Sums over the regions of each class.

    Args:
        images: ``(N, C, H, W)``.
        rows: ``(N, H, W)`` int64, −1 for no class.
        classes: K.
        side: P, side of a patch.

    Returns:
        ``regions (K,)`` int64; ``facts`` and ``facts2 (K, FACTS)``; ``patches (K, C, P, P)`` and ``masks (K, 1, P, P)``
        with ``inside (K, 1, P, P)``, the regions whose patch reaches that far in the image; ``colors (K, 2C)`` and
        ``colors2 (K, 2C, 2C)``: mean colour of the region and of a ring around it.
    """
    found = find_regions(rows, classes)
    height, width = rows.shape[1:]
    channels = images.shape[1]
    facts = region_facts(found, height, width)
    sums = {
        "regions": torch.bincount(found.row, minlength=classes),
        "facts": _by_row(facts, found.row, classes),
        "facts2": _by_row(facts.square(), found.row, classes),
        "patches": images.new_zeros(classes, channels, side, side, dtype=torch.float64),
        "masks": images.new_zeros(classes, 1, side, side, dtype=torch.float64),
        "inside": images.new_zeros(classes, 1, side, side, dtype=torch.float64),
        "colors": images.new_zeros(classes, 2 * channels, dtype=torch.float64),
        "colors2": images.new_zeros(classes, 2 * channels, 2 * channels, dtype=torch.float64),
    }
    for first in range(0, len(found.row), CHUNK):
        part = Regions(*(field[first : first + CHUNK] for field in found))
        patches, masks, inside = cut(images, rows, part, side)
        colors = _colors(patches, masks, inside).double()
        more = {
            "patches": patches * inside,
            "masks": masks,
            "inside": inside,
            "colors": colors,
            "colors2": colors[:, :, None] * colors[:, None],
        }
        for name, values in more.items():
            sums[name] += _by_row(values.double(), part.row, classes)
    return sums


def region_facts(found: Regions, height: int, width: int) -> Tensor:
    """Log of area / radius², log of radius / √(H W), centre as shares of H and W: ``(I, FACTS)`` float64."""
    size = (height * width) ** 0.5
    fill = (found.area / found.radius.square()).log()
    scale = found.centre.new_tensor([height, width])
    return torch.cat([fill[:, None], (found.radius / size).log()[:, None], found.centre / scale], 1)


def cut(images: Tensor, rows: Tensor, found: Regions, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches ``(I, C, P, P)``, masks ``(I, 1, P, P)`` and where they lie in the image ``(I, 1, P, P)``, 0 or 1."""
    height, width = rows.shape[1:]
    at = (torch.arange(side, device=images.device, dtype=torch.float64) + 0.5) / side * 2 - 1
    y = found.centre[:, :1] + REACH * found.radius[:, None] * at
    x = found.centre[:, 1:] + REACH * found.radius[:, None] * at
    y, x = (2 * y / height - 1).to(images), (2 * x / width - 1).to(images)
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    mask = (rows[found.image] == found.row[:, None, None]).to(images)[:, None]
    both = F.grid_sample(torch.cat([images[found.image], mask], 1), grid, padding_mode="border", align_corners=False)
    inside = (grid.abs().amax(-1) <= 1).to(images)[:, None]
    return both[:, :-1], both[:, -1:] * inside, inside


def _colors(patches: Tensor, masks: Tensor, inside: Tensor) -> Tensor:
    """Mean colour of region and ring ``(I, 2C)``; the ring is what lies within an eighth of the patch's side."""
    reach = max(1, patches.shape[-1] // 8)
    near = F.max_pool2d(masks, 2 * reach + 1, 1, reach)
    weights = (masks, (near - masks).clamp_min(0) * inside)
    return torch.cat([(patches * w).sum((2, 3)) / w.sum((2, 3)).clamp_min(1e-6) for w in weights], 1)


def _by_row(values: Tensor, row: Tensor, classes: int) -> Tensor:
    return values.new_zeros(classes, *values.shape[1:]).index_add_(0, row, values)
