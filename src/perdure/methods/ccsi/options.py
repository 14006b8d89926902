"""Settings of CCSI: a clean profile, the published one, and a name for every difference between them."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from perdure.methods.inversion.engine import warmup_cosine
from perdure.methods.options import Options


class SynthesisOptions(Options):
    """How impressions are made: the clean profile; :data:`FAITHFUL_SYNTHESIS` holds the published values."""

    steps: int = Field(1000, ge=1, description="optimisation steps of a group; published 5000")
    group_size: int = Field(
        40, ge=2, description="images whose moments are matched together; TV and moments depend on it"
    )
    groups_at_once: int = Field(8, ge=1, description="groups optimised side by side; changes memory and speed only")
    lr: float = Field(0.05, gt=0, description="base learning rate of Adam")
    betas: tuple[float, float] = Field((0.5, 0.9), description="decay rates of Adam's two averages")
    warmup: int = Field(100, ge=0, description="steps in which the learning rate rises to its base")
    decay: float = Field(
        0.5, gt=0, description="learning rate after the warm-up, times 2 base: 0.5 goes on from the base; published 0.2"
    )
    jitter: int = Field(2, ge=0, description="largest circular shift in pixels along each axis; published 30")
    flip: bool = Field(False, description="mirror half of the steps left to right; published true")
    kappa: float = Field(1.0, ge=0, description="weight of cross-entropy")
    tv1: float = Field(0.0, ge=0, description="weight of total variation, mean absolute differences")
    tv2: float = Field(
        0.01, ge=0, description="weight of total variation, norms of differences; published 0.001 to 0.1"
    )
    l2: float = Field(0.1, ge=0, description="weight of the images' norms")
    moments: float = Field(1.0, ge=0, description="weight of the distance to the running statistics")
    first_layer: float = Field(10.0, ge=0, description="weight of the first normalisation layer in it, others have 1")
    statistics: Literal["none", "position", "class"] = Field(
        "class",
        description="moments of single images to match: none, those kept of each class, or (published, without "
        "gradient) those of the last training batch by position; other than none needs Continual Normalization",
    )
    statistics_weight: float = Field(1.0, ge=0, description="weight of the distance to them")
    start: Literal["mean", "noise"] = Field(
        "mean", description="start from class means with noise, or from noise alone"
    )
    noise: float = Field(0.1, ge=0, description="standard deviation of the noise on class means")
    clamp: Literal["range", "channel0"] = Field(
        "range", description="clip all channels to 0..1, or (published) the first to ImageNet's standardised range"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="images of the last step, or (published) of the one with the lowest loss under jitter"
    )
    targets: Literal["balanced", "random"] = Field(
        "balanced", description="classes in turn, or (published) each image's class drawn at random"
    )
    settle_window: int | None = Field(
        None, ge=1, description="stop a group when its mean loss over so many steps no longer falls; none: never"
    )
    settle_tolerance: float = Field(0.01, ge=0, lt=1, description="relative fall from window to window that counts")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of products in convolutions, all else is fp32; auto: bf16 on a CPU that multiplies it natively",
    )

    @model_validator(mode="after")
    def _check(self) -> SynthesisOptions:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be shorter than steps ({self.steps})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be at least 0 and less than 1")
        return self

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear rise, then half a cosine to 0 (spec 3.4)."""
        return warmup_cosine(step, self.steps, self.lr, self.warmup, self.decay)


FAITHFUL_SYNTHESIS: Final[dict[str, Any]] = {
    "steps": 5000,
    "decay": 0.2,
    "jitter": 30,
    "flip": True,
    "statistics": "position",
    "clamp": "channel0",
    "keep": "best",
    "targets": "random",
    "precision": "fp32",
}
"""What the published code does where the clean profile does otherwise (spec 3.3, 3.4, 7.2 Q4 and J3)."""

Compat = Literal["transductive"]

FAITHFUL: Final[dict[str, Any]] = {
    "groups": (16, 24, 30),
    "balance": "sampler+weights",
    "replacement": True,
    "idc_source": "pool",
    "idc_moves_statistics": True,
    "checked": "none",
    "compat": ("transductive",),
    "synthesis": FAITHFUL_SYNTHESIS,
}
"""What the published code does where the clean profile does otherwise (spec CCSI, sections 3 to 5 and 7)."""


class CcsiOptions(Options):
    """Settings of CCSI. Defaults are the clean profile; ``profile: faithful`` puts the published ones in place."""

    profile: Literal["clean", "faithful"] = Field(
        "clean", description="defaults of all settings below: repaired, or as the published code behaves"
    )
    replay: Literal["impressions", "means", "none"] = Field(
        "impressions", description="what is replayed for old classes: synthesised images, their mean images, or nothing"
    )
    per_class: int = Field(200, ge=1, description="images per class to replay, unless `groups` is given")
    groups: tuple[int, ...] | None = Field(
        None, description="groups of synthesis.group_size images before the second task, the third, ...; last one holds"
    )
    synthesis: SynthesisOptions = Field(SynthesisOptions(), description="how impressions are made")
    checked: Literal["all", "first", "none"] = Field(
        "all",
        description="impressions made and compared with the training images before a task's data is closed: all that "
        "the next task replays, the first synthesis.groups_at_once groups, or none",
    )
    previews: int = Field(8, ge=0, description="impressions per class shown in the report")
    share: float = Field(0.66, gt=0, lt=1, description="share of replayed images in a batch (r)")
    balance: Literal["sampler", "weights", "sampler+weights"] = Field(
        "sampler", description="what balances class sizes: the share of replayed images, loss weights, or both"
    )
    replacement: bool = Field(
        False, description="draw images with replacement, so that `share` holds on average only, as published"
    )
    margin: float = Field(0.3, description="m of the margin loss")
    margin_top: int = Field(1, ge=1, description="new classes that each old sample is compared with (K)")
    lambda_margin: float = Field(1.0, ge=0, description="weight of the margin loss; 0 for none")
    lambda_lf: float = Field(
        5.0, ge=0, description="weight of less-forget distillation, times √(old / step); 0 for none"
    )
    lambda_idc: float = Field(1.0, ge=0, description="weight of the intra-domain contrastive loss; 0 for none")
    idc_momentum: float = Field(0.9, gt=0, le=1, description="share of the batch in a moving centroid (ρ)")
    idc_temperature: float = Field(1.0, gt=0, description="temperature τ of the contrastive loss")
    idc_source: Literal["new_task", "pool"] = Field(
        "new_task",
        description="unlabelled images: the new task's own training images, or the split that stream.pool grants",
    )
    idc_moves_statistics: bool = Field(
        False, description="let the unlabelled pass move the running statistics, as published (J4)"
    )
    imprint: bool = Field(True, description="start new class weights from the mean feature of their images")
    freeze_old: bool = Field(True, description="keep the weights of old classes as they are")
    compat: tuple[Compat, ...] = Field(
        (), description="transductive: allow test images in the pool, as published; figures are then optimistic"
    )
    by_task: tuple[dict[str, Any], ...] = Field(
        (), description="settings that differ for the second task, the third, ...; the last entry holds for the rest"
    )

    @model_validator(mode="before")
    @classmethod
    def _profile(cls, given: Any) -> Any:
        """Put the published values under what is given."""
        if not isinstance(given, dict) or given.get("profile") != "faithful":
            return given
        synthesis = FAITHFUL["synthesis"] | dict(given.get("synthesis") or {})
        return FAITHFUL | given | {"synthesis": synthesis}

    @model_validator(mode="after")
    def _tasks(self) -> CcsiOptions:
        for number in range(len(self.by_task)):
            self.at(number + 1)
        return self

    def at(self, task: int) -> CcsiOptions:
        """The settings that hold at a task, by its index; the first task's are those without ``by_task``.

        Raises:
            ValueError: An entry of ``by_task`` names an unknown setting or one that cannot change in a run.
        """
        if task == 0 or not self.by_task:
            return self
        changed = self.by_task[min(task, len(self.by_task)) - 1]
        fixed = sorted({"profile", "by_task", "compat", "previews", "replay", "checked"} & changed.keys())
        if fixed:
            raise ValueError(f"by_task cannot change '{fixed[0]}'")
        plain = self.model_dump() | {"by_task": ()}
        synthesis = plain["synthesis"] | dict(changed.get("synthesis") or {})
        return CcsiOptions.model_validate(plain | changed | {"synthesis": synthesis})

    def groups_before(self, task: int, classes: int) -> int:
        """Groups of impressions that stand for ``classes`` old classes at a task."""
        if self.groups is not None:
            return self.groups[min(task, len(self.groups)) - 1]
        return -(-self.per_class * classes // self.synthesis.group_size)
