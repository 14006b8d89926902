"""Methods: one file each. This table is all there is to find them; it imports nothing."""

from __future__ import annotations

from typing import Final, NamedTuple


class Entry(NamedTuple):
    """Where a method lives and what it is, for ``perdure list methods``."""

    target: str
    summary: str
    source: str


METHODS: Final[dict[str, Entry]] = {
    "finetune": Entry(
        "perdure.methods.finetune:Finetune", "learns each task and protects nothing: the lower bound", "-"
    ),
    "joint": Entry("perdure.methods.joint:Joint", "learns all tasks at once: the upper bound", "-"),
    "independent": Entry(
        "perdure.methods.independent:Independent",
        "learns a model of its own for each task: what plasticity is measured against",
        "-",
    ),
    "lwf": Entry(
        "perdure.methods.lwf:Lwf",
        "agrees with its frozen predecessor about earlier classes; keeps nothing but weights",
        "LwF, ECCV 2016",
    ),
    "star": Entry(
        "perdure.methods.star:Star", "prototype replay with balanced binary cross-entropy", "STAR, NeurIPS 2023"
    ),
    "clip_ciss": Entry(
        "perdure.methods.clip_ciss.clip_ciss:ClipCiss",
        "class queries from text, masks from attention; holds relations to texts and old queries",
        "CLIP-CISS, 2024",
    ),
    "ccsi": Entry(
        "perdure.methods.ccsi.ccsi:Ccsi",
        "classification: replays images synthesised from the frozen model and class means",
        "CCSI, MedIA 2024",
    ),
    "ccsi_seg": Entry(
        "perdure.methods.ccsi_seg.ccsi_seg:CcsiSeg",
        "segmentation: replays images synthesised under drawn layouts (ours, not published)",
        "ours, after CCSI",
    ),
    "cgr": Entry(
        "perdure.methods.cgr.cgr:Cgr",
        "segmentation of images: a diffusion network generates image-mask pairs of earlier tasks",
        "CGR, MICCAI 2024",
    ),
}
