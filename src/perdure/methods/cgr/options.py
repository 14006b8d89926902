"""Settings of the generator of pairs, of what it makes, and of CGR."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from perdure.engine.options import Precision
from perdure.methods.options import Options

Defect = Literal[
    "frozen_timesteps", "frozen_adapters", "minmax_masks", "minmax_images", "current_classes", "full_prompts"
]


class GeneratorOptions(Options):
    """The joint diffusion network and its training. The defaults are the published ones."""

    size: Literal["full", "small", "smoke"] = Field(
        "full", description="182 million parameters for images of 256 pixels, 37 million for 128, or 1 million for 32"
    )
    steps: int = Field(400_000, ge=1, description="optimiser steps of the first task")
    later_steps: int | None = Field(None, ge=1, description="of later tasks; the same as `steps` if not given")
    batch_size: int = Field(8, ge=2, description="pairs a step; at later tasks half of them are generated")
    lr: float = Field(1e-4, gt=0, description="learning rate of AdamW")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate in each task; constant, as published, or down to 0 (cosine)"
    )
    weight_decay: float = Field(0.01, ge=0, description="of all weights but the scales of the adapters")
    clip: float | None = Field(None, gt=0, description="largest global gradient norm")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of a moving average of the weights")
    precision: Precision | None = Field(
        None, description="of training and sampling; if not given, that of the run in training, and fp32 in sampling"
    )
    checkpointing: bool = Field(False, description="less memory and more time: activations are computed twice")
    conditional: Literal["alternate", "both", "random", "none"] = Field(
        "alternate",
        description="which part is clean in the second pass of a step: mask and image in turns, both in two passes, "
        "one at random, or no second pass",
    )
    adapters: bool = Field(True, description="an adapter of the prompts per task; without, prompts go in as they are")
    freeze_past_adapters: bool = Field(False, description="train the adapter of the current task only")
    gamma: float = Field(1e-4, ge=0, description="first value of the scales of a new adapter")
    adapter_eps: float = Field(
        1e-8, gt=0, description="epsilon of the adapters' AdamW: their gradients are tiny in the first steps"
    )
    empty: Literal["drop", "keep"] = Field("drop", description="training images whose mask is empty")
    text: Literal["hash", "clip"] = Field(
        "hash",
        description="encoder of the prompts: CLIP's from a folder, or a stand-in without weights (hash), to which "
        "similar prompts are not similar",
    )
    text_folder: Path | None = Field(
        None, description="text=clip: folder of a text encoder, such as stable-diffusion-2; nothing is fetched"
    )
    text_width: int = Field(768, ge=2, description="length of its embeddings: 1024 stable-diffusion-2, 768 ViT-L/14")
    tokens: int = Field(77, ge=1, le=77, description="text=hash: positions of a prompt")
    prefixes: dict[str, str] = Field(
        default_factory=dict,
        description="task: beginning of its prompts; published ones for cardiac, fundus and prostate",
    )
    phrases: dict[str, str] = Field(
        default_factory=dict, description="class: how prompts call it; 'a' and its name if not given"
    )


class PairOptions(Options):
    """The pairs that are generated at the end of a task."""

    count: int = Field(3000, ge=1, le=1_000_000, description="pairs per task")
    batch: int = Field(8, ge=1, description="pairs that are made at once, and stored in one file")
    sampler: Literal["ddim", "dpm"] = Field(
        "ddim", description="ddim, as published with 100 steps, or DPM-Solver++ (dpm) with 20 to 25"
    )
    steps: int = Field(100, ge=1, le=1000, description="steps of the sampler")
    source: Literal["latest", "first"] = Field(
        "latest",
        description="latest: all past tasks are generated anew by the newest generator; first: each keeps the pairs "
        "that were generated when it was learned",
    )
    grey: bool = Field(True, description="of tasks whose images are grey: average the channels of generated ones")
    majority: bool = Field(False, description="replace each label by the most frequent one of its 3 × 3 pixels")
    gate: bool = Field(
        False,
        description="leave out pairs whose mask is empty or holds a structure with an area that was never seen, or "
        "in pieces; counted in any case",
    )
    labels: Literal["generated", "seen"] = Field(
        "generated",
        description="masks of pairs: the generated ones, as published, or what the trained method sees in the images "
        "(seen), as deep generative replay labels them",
    )
    least_fit: float = Field(
        0.0,
        ge=0,
        le=1,
        description="leave out pairs whose generated mask has a smaller Dice with what the trained method sees in the "
        "image",
    )
    check_copies: bool = Field(
        True,
        description="compare the first pairs of each task with its real images, and leave out what is too near",
    )
    previews: int = Field(4, ge=0, le=100, description="generated pairs per class that the report shows")


class CgrOptions(Options):
    """Settings of CGR."""

    generator: GeneratorOptions = Field(GeneratorOptions(), description="the generator of pairs")
    pairs: PairOptions = Field(PairOptions(), description="what it makes")
    dice_absent: Literal["count", "ignore"] = Field(
        "count",
        description="Dice loss of a class that an image does not show: counted, as published, or left out",
    )
    distill: float = Field(
        0.0,
        ge=0,
        description="weight of agreeing with the segmenter of before the task about old classes, on new images and on "
        "pairs; none, as published",
    )
    rotate: float = Field(0.2, ge=0, le=1, description="probability of turning a training image by up to 30 degrees")
    compat: tuple[Defect, ...] = Field(
        (),
        description="published defects to bring back: frozen_timesteps (Q8: four fixed noise levels after the first "
        "task), frozen_adapters (Q9: adapters are never trained), minmax_masks and minmax_images (Q11, Q12, Q20: each "
        "sample is stretched to its own range), current_classes (Q10: masks of all tasks are decoded with the number "
        "of classes of the current one), full_prompts (Q13: generated pairs always name every class)",
    )
