"""What one pass over a task's images measures: regions of classes, background, moments of feature maps.

Everything is a sum in float64 or int64 and adds over batches and processes. All pixels of a class in one image are
one region. Its centre is the centroid and its radius the root of the mean squared distance to it, which a few stray
pixels hardly move. A *patch* is the square of REACH radii around the centre, resampled to a fixed side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.methods.ccsi_seg.terms import one_hot
from perdure.networks.layers import CONVOLUTIONS

REACH: Final = 2.2
"""Half the side of a patch in radii: a disc takes 0.64 of it, a thin bar 0.79."""
LEAST_PIXELS: Final = 12
"""Regions of fewer pixels do not show a shape and are left out."""
CHUNK: Final = 64
"""Regions that are resampled at a time."""
FACTS: Final = 4
"""Numbers per region: log of area / radius², log of radius / √(H W), centre y and x as shares of H and W."""
BANDS: Final = 16
"""Rings of spatial frequency in which the power of the background's texture is kept."""
BINS: Final = 1024
RANGE: Final = 16.0
"""Intensities are counted in BINS steps of ± RANGE; normalised images lie well inside."""
MASK_PIXELS: Final = 1 << 24
"""Pixels of masks that exist at a time (at least those of one image)."""


# Regions --------------------------------------------------------------------------------------------------------------


class Regions(NamedTuple):
    """I regions: image ``(I,)``, row ``(I,)``, centre y, x ``(I, 2)`` and radius ``(I,)`` in pixels, area ``(I,)``."""

    image: Tensor
    row: Tensor
    centre: Tensor
    radius: Tensor
    area: Tensor


def find_regions(rows: Tensor, classes: int) -> Regions:
    """Regions of at least LEAST_PIXELS in rows ``(N, H, W)`` (−1: no class), by image, then row. float64."""
    images, inside = len(rows), rows >= 0
    image, y, x = inside.nonzero(as_tuple=True)
    place, cells = image * classes + rows[inside], images * classes
    y, x = y.double() + 0.5, x.double() + 0.5
    area = torch.bincount(place, minlength=cells).double()
    many = area.clamp_min(1.0)
    mean_y, mean_x = (torch.bincount(place, at, minlength=cells) / many for at in (y, x))
    spread = torch.bincount(place, y.square() + x.square(), minlength=cells) / many
    # + 1/6: the variance of a pixel's own square
    radius = (spread - mean_y.square() - mean_x.square() + 1 / 6).clamp_min(0.25).sqrt()
    found = (area >= LEAST_PIXELS).nonzero()[:, 0]
    centre = torch.stack([mean_y, mean_x], 1)
    return Regions(found // classes, found % classes, centre[found], radius[found], area[found])


def region_facts(found: Regions, height: int, width: int) -> Tensor:
    """The FACTS of each region ``(I, FACTS)`` float64."""
    fill = (found.area / found.radius.square()).log()
    scale = (found.radius / (height * width) ** 0.5).log()
    centre = found.centre / found.centre.new_tensor([height, width])
    return torch.cat([fill[:, None], scale[:, None], centre], 1)


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
    found, channels = find_regions(rows, classes), images.shape[1]
    facts = region_facts(found, *rows.shape[1:])
    sums = {"regions": torch.bincount(found.row, minlength=classes)}
    for name, shape in (
        ("facts", (FACTS,)),
        ("facts2", (FACTS,)),
        ("patches", (channels, side, side)),
        ("masks", (1, side, side)),
        ("inside", (1, side, side)),
        ("colors", (2 * channels,)),
        ("colors2", (2 * channels, 2 * channels)),
    ):
        sums[name] = images.new_zeros(classes, *shape, dtype=torch.float64)
    for first in range(0, len(found.row), CHUNK):
        here = slice(first, first + CHUNK)
        part = Regions(*(field[here] for field in found))
        patches, masks, inside, colors = _cut(images, rows, part, side)
        measured = {"facts": facts[here], "facts2": facts[here].square(), "patches": patches * inside, "masks": masks,
                    "inside": inside, "colors": colors, "colors2": colors[:, :, None] * colors[:, None]}  # fmt: skip
        for name, values in measured.items():
            sums[name].index_add_(0, part.row, values.double())
    return sums


def _cut(images: Tensor, rows: Tensor, found: Regions, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches ``(I, C, P, P)``, masks and where they lie in the image ``(I, 1, P, P)``, and mean colours ``(I, 2C)``.

    The colours are those of the region and of a ring around it, an eighth of the patch's side wide.
    """
    height, width = rows.shape[1:]
    at = (torch.arange(side, device=images.device, dtype=torch.float64) + 0.5) / side * 2 - 1
    y = found.centre[:, :1] + REACH * found.radius[:, None] * at
    x = found.centre[:, 1:] + REACH * found.radius[:, None] * at
    y, x = (2 * y / height - 1).to(images), (2 * x / width - 1).to(images)
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    mask = (rows[found.image] == found.row[:, None, None]).to(images)[:, None]
    both = F.grid_sample(torch.cat([images[found.image], mask], 1), grid, padding_mode="border", align_corners=False)
    inside = (grid.abs().amax(-1) <= 1).to(images)[:, None]
    patches, masks, reach = both[:, :-1], both[:, -1:] * inside, max(1, side // 8)
    near = F.max_pool2d(masks, 2 * reach + 1, 1, reach)
    weights = (masks, (near - masks).clamp_min(0) * inside)
    colors = torch.cat([(patches * w).sum((2, 3)) / w.sum((2, 3)).clamp_min(1e-6) for w in weights], 1)
    return patches, masks, inside, colors.double()


# Background -----------------------------------------------------------------------------------------------------------


def background_sums(images: Tensor, background: Tensor, side: int) -> dict[str, Tensor]:
    """Sums over images.

    Args:
        images: ``(N, C, H, W)``.
        background: ``(N, H, W)`` bool, pixels without a class.
        side: P, side of the mean background.

    Returns:
        ``images ()`` int64; ``intensities (C, BINS)`` int64, of all pixels; ``background (C, P, P)`` and
        ``background_seen (1, P, P)``; ``tones (C,)`` and ``tones2 (C, C)`` of the mean colour of the background;
        ``texture (C, C)``, covariance within the background; ``power (BANDS,)``, mean spectrum over channels.
    """
    images, channels = images.double(), images.shape[1]
    step = ((images + RANGE) * (BINS / (2 * RANGE))).long().clamp_(0, BINS - 1)
    step += torch.arange(channels, device=images.device).view(1, -1, 1, 1) * BINS
    mask = background[:, None].double()
    area = mask.sum((2, 3)).clamp_min(1.0)
    tones = (images * mask).sum((2, 3)) / area
    around = (images - tones[:, :, None, None]) * mask
    flat, band = around.flatten(2), frequency_bands(images.shape[2:], images.device).flatten()
    spectrum = torch.fft.rfft2(around).abs().square().mean(1).flatten(1).sum(0)
    power = spectrum.new_zeros(BANDS).index_add_(0, band, spectrum)
    return {
        "images": torch.tensor(len(images), device=images.device),
        "intensities": torch.bincount(step.flatten(), minlength=channels * BINS).view(channels, BINS),
        "background": F.adaptive_avg_pool2d(images * mask, side).sum(0),
        "background_seen": F.adaptive_avg_pool2d(mask, side).sum(0),
        "tones": tones.sum(0),
        "tones2": tones.T @ tones,
        "texture": (flat @ flat.mT / area[:, :, None]).sum(0),
        "power": power / torch.bincount(band, minlength=BANDS).clamp_min(1),
    }


def frequency_bands(size: Sequence[int], device: torch.device) -> Tensor:
    """Band of each frequency of ``rfft2`` ``(H, W // 2 + 1)``; bands are equally wide in the root of the frequency."""
    y = torch.fft.fftfreq(size[0], device=device)[:, None]
    x = torch.fft.rfftfreq(size[1], device=device)[None]
    far = (y.square() + x.square()).sqrt() / 0.5**0.5
    band: Tensor = (far.sqrt() * BANDS).long()
    return band.clamp_max(BANDS - 1)


# Moments of feature maps (spec 8.3) -----------------------------------------------------------------------------------


@contextmanager
def recorded_maps(body: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that collects the outputs of the convolutions of ``body``, in the order in which they run.

    Before normalisation, so it serves networks whose normalisation has no running statistics as well.
    """
    maps: list[Tensor] = []

    def note(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        maps.append(out)

    hooks = [m.register_forward_hook(note) for m in body.modules() if isinstance(m, CONVOLUTIONS)]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


class MomentSums(NamedTuple):
    """Sums under R masks over T channels of L layers: weight ``(R, L)``, values and squares ``(R, T)``."""

    weight: Tensor
    values: Tensor
    squares: Tensor

    def moments(self, layers: Tensor) -> Tensor:
        """Mean and variance ``(2, R, T)``, with the layer of each channel ``(T,)``; zeros under an empty mask."""
        weight = self.weight[:, layers].clamp_min(1e-6)
        mean = self.values / weight
        return torch.stack([mean, (self.squares / weight - mean.square()).clamp_min(0.0)])


def moment_sums(maps: Sequence[Tensor], masks: Tensor) -> MomentSums:
    """Sums of feature maps under masks; a cell counts by the share of it that the mask covers.

    Args:
        maps: Of each layer ``(N, c, h, w)``.
        masks: ``(N, R, H, W)``, in the number format of the sums.
    """
    resized: dict[torch.Size, Tensor] = {}
    weight, values, squares = [], [], []
    for found in maps:
        size = found.shape[2:]
        if size not in resized:
            resized[size] = F.adaptive_avg_pool2d(masks, (size[0], size[1])).transpose(0, 1).flatten(1)
        mask = resized[size]
        cells = found.to(masks.dtype).movedim(1, -1).flatten(0, -2)
        weight.append(mask.sum(1))
        values.append(mask @ cells)
        squares.append(mask @ cells.square())
    return MomentSums(torch.stack(weight, 1), torch.cat(values, 1), torch.cat(squares, 1))


def label_sums(maps: Sequence[Tensor], rows: Tensor, counts: Tensor, classes: int) -> MomentSums:
    """Sums, in float64, over the cells that count and over those of each class: R = 1 + K masks.

    Args:
        maps: Of each layer ``(N, c, h, w)``.
        rows: Class of each pixel ``(N, H, W)``, −1 for none.
        counts: ``(N, H, W)`` bool.
        classes: K.
    """
    images = max(1, MASK_PIXELS // ((1 + classes) * rows[0].numel()))
    found: list[MomentSums] = []
    for first in range(0, len(rows), images):
        here = slice(first, first + images)
        masks = torch.cat([counts[here, None].float(), one_hot(rows[here], classes)], 1)
        found.append(moment_sums([m[here] for m in maps], masks.double()))
    return MomentSums(*(torch.stack(parts).sum(0) for parts in zip(*found, strict=True)))


def layer_of(maps: Sequence[Tensor]) -> Tensor:
    """Layer of each of the T channels ``(T,)`` int64."""
    counts = torch.tensor([found.shape[1] for found in maps])
    return torch.repeat_interleave(counts).to(maps[0].device)
