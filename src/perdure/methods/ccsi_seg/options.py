"""Settings of class impressions for segmentation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from perdure.methods.options import Options


class SynthesisOptions(Options):
    """How impressions are made."""

    per_class: int = Field(40, ge=1, description="impressions a class that are made before every later task")
    batch: int = Field(32, ge=1, description="impressions optimised together; their moments are matched together")
    steps: int = Field(60, ge=1, description="optimiser steps of a batch")
    lr: float = Field(0.05, gt=0, description="learning rate of Adam on the pixels, in units of the intensity window")
    start: Literal["mean", "colors"] = Field(
        "colors", description="start image: mean patches on the mean ground, or these recoloured from colour statistics"
    )
    noise: float = Field(0.1, ge=0, description="deviation of the noise on the start image, in normalised intensity")
    most_classes: int = Field(4, ge=1, description="most classes in one layout")
    warp: float = Field(0.12, ge=0, description="size of the elastic warp of a mean mask, as a share of its radius")
    band: int = Field(2, ge=0, description="pixels on either side of an edge of the layout that the teacher decides")
    lambda_layout: float = Field(1.0, ge=0, description="weight of balanced cross-entropy and Dice against the layout")
    lambda_global: float = Field(0.3, ge=0, description="weight of the moments of whole feature maps")
    lambda_masked: float = Field(0.3, ge=0, description="weight of the moments under each class's mask")
    lambda_tv: float = Field(0.05, ge=0, description="weight of total variation, an image")
    lambda_l2: float = Field(0.1, ge=0, description="weight of the distance to the start image, an image")
    first_layer: float = Field(10.0, gt=0, description="weight of the first convolution's moments, others weigh 1")
    jitter: float = Field(0.0625, ge=0, lt=0.5, description="largest shift while optimising, as a share of the side")
    confidence: float = Field(0.8, ge=0.5, lt=1, description="least certainty of the teacher to label a pixel")
    least_dice: float = Field(
        0.5, ge=0, le=1, description="impressions with a lower overlap of labels and layout are dropped"
    )


class LayoutImpressionsOptions(Options):
    """Settings of the method."""

    replay: Literal["impressions", "means", "none"] = Field(
        "impressions",
        description="what stands for old classes: synthesised images, start images as they are, or nothing",
    )
    synthesis: SynthesisOptions = Field(SynthesisOptions(), description="how impressions are made")
    patch: int = Field(32, ge=4, description="side of the mean patches in pixels")
    share: float = Field(1.0, gt=0, description="synthetic images a real one in a batch")
    confidence: float = Field(0.7, ge=0.5, lt=1, description="least certainty of a pseudo-label on a real image")
    lambda_pseudo: float = Field(1.0, ge=0, description="weight of pseudo-labels of old classes on real images")
    lambda_old: float = Field(1.0, ge=0, description="weight of old classes on synthetic images")
    lambda_new: float = Field(1.0, ge=0, description="weight of new classes on synthetic images")
    negatives: Literal["old_pixels", "all"] = Field(
        "old_pixels",
        description="where new classes are absent in synthetic images: where the teacher saw an old class, or anywhere",
    )
    lambda_lf: float = Field(5.0, ge=0, description="weight of distilling features (less-forget), times √(old / new)")
    lambda_margin: float = Field(0.0, ge=0, description="weight of the margin between old and new classes; 0 for none")
    margin: float = Field(1.0, description="least lead of the own logit over new ones on old pixels")
    ignore_as_negative: bool = Field(True, description="count ignored pixels as negatives of new classes")
    previews: int = Field(4, ge=0, description="impressions a class that are kept to be shown in the report")
