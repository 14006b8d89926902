"""The section ``volumes`` of a recipe. Reading and checking it needs neither torch nor nnU-Net."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST_SPACING: Final = 1000.0
"""In mm: no scanner has more, and files whose unit is another one do."""
LONGEST_CHANNEL: Final = 24
"""Characters of a channel's name that are kept."""
CHANNEL_NAME: Final = re.compile(rf"[\w .+-]{{1,{LONGEST_CHANNEL}}}")
"""Names of channels as a run keeps them. Those of a data set are free text of somebody else."""
Millimetres = Annotated[float, Field(gt=0, le=LARGEST_SPACING)]
Side = Annotated[int, Field(ge=1, le=1 << 12)]
Augment = Literal["nnunet", "mirror", "none"]


class VolumeOptions(BaseModel):
    """How volumes are shown to the network."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    view: Literal["auto", "volumes", "slices", "pictures"] = Field(
        "auto",
        description="volumes: patches for a 3D network, and pictures are refused; slices: single slices for a 2D "
        "network; pictures: as in the section augment, and volumes are refused; auto: volumes or pictures, as the data "
        "are",
    )
    plan: Literal["first", "given", "per_task"] = Field(
        "first",
        description="where spacing, patch and normalisation come from: nnU-Net's plan for the data of the first task "
        "(first), of each task (per_task), or spacing and patch below (given)",
    )
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = Field(
        None,
        description="size of a voxel in mm that every volume is brought to (depth, height, width); null: as planned",
    )
    patch: tuple[Side, Side, Side] | None = Field(
        None, description="voxels of a training patch (depth, height, width); null: as planned"
    )
    normalisation: Literal["auto", "ct", "zscore", "none"] = Field(
        "auto",
        description="ct: cut to the usual values of the labelled voxels; zscore: every volume to mean 0, deviation 1; "
        "auto: by the names of the channels, as in nnU-Net",
    )
    foreground: float = Field(
        0.33, ge=0, le=1, description="share of training samples that are centred on a labelled voxel"
    )
    augment: Augment = Field(
        "nnunet",
        description="what is varied at random in training: all that nnU-Net varies (mirrored along every axis too), "
        "mirroring alone, or nothing",
    )
    overlap: float = Field(0.5, ge=0, le=0.95, description="prediction: share of a window that its neighbour covers")
    blend: Literal["average", "centre"] = Field(
        "average",
        description="where windows overlap: average their scores, or take the class from the window in whose middle a "
        "voxel lies most, which needs far less memory where there are many classes",
    )
    axis: int = Field(0, ge=0, le=2, description="view=slices: axis that is cut: 0 depth, 1 height, 2 width")
    intensity: tuple[float, float] = Field(
        (0.5, 99.5), description="view=slices: percentiles of each volume that become black and white"
    )
    size: int = Field(
        256, ge=8, le=1 << 12, description="view=slices: side of the square that slices are scaled and padded to"
    )
    channels: int | None = Field(
        None,
        ge=1,
        le=16,
        description="view=slices: channels that the network sees, grey images are repeated: 3 where grey images and "
        "colour photographs follow one another; null: those of the first data set",
    )

    @model_validator(mode="after")
    def _complete(self) -> VolumeOptions:
        if self.view in ("auto", "volumes") and self.plan == "given" and (self.spacing is None or self.patch is None):
            raise ValueError("plan: given needs volumes.spacing and volumes.patch")
        if not 0 <= self.intensity[0] < self.intensity[1] <= 100:
            raise ValueError("volumes.intensity must be two percentiles from 0 to 100, smaller one first")
        return self


def kept_channels(names: Sequence[str]) -> tuple[str, ...]:
    """Names of channels as a run keeps them: other signs become ``_``, and long names are cut."""
    plain = (re.sub(r"[^\w .+-]+", "_", name)[:LONGEST_CHANNEL].strip() for name in names)
    return tuple(name or "_" for name in plain)
