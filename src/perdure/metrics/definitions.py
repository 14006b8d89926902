"""What every figure means, once: the table behind ``perdure list metrics``, the reports and the docs.

A figure's full name carries its definition, e.g. ``miou.all[bg=in,absent=skip]``. Imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from perdure.errors import UsageError, nearest

if TYPE_CHECKING:
    from perdure.data.source import Kind

Scope = Literal["class", "task", "stream", "case"]
Unit = Literal["%", "points", "mm"]
TOLERANCE: Final = 2.0
"""Of surface Dice, in mm, where a recipe names no other."""
_NAME: Final = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[(.*)\])?\s*")


@dataclass(frozen=True, slots=True)
class Option:
    """One choice within a definition.

    Args:
        key: Its name, e.g. ``"bg"``.
        meaning: Value -> sentence. The first value is the default.
        bare: Written as the value alone (``forgetting[max-last]``) instead of ``key=value``.
        quiet: Left out of the full name where it has its default.
        number: Any number above 0 may stand for the default, which stands in the meaning as ``{}``.
    """

    key: str
    meaning: dict[str, str]
    bare: bool = False
    quiet: bool = False
    number: bool = False

    @property
    def default(self) -> str:
        """The value that holds where none is written."""
        return next(iter(self.meaning))

    def known(self, text: str) -> str | None:
        """A value as full names write it; ``None`` if the option does not have it."""
        if not self.number:
            return text if text in self.meaning else None
        with suppress(ValueError):
            if 0 < float(text) < math.inf:
                return f"{float(text):g}"
        return None

    def means(self, value: str) -> str:
        """The sentence of a value."""
        return next(iter(self.meaning.values())).format(value) if self.number else self.meaning[value]


@dataclass(frozen=True, slots=True)
class Definition:
    """A figure and its definition.

    Args:
        name: Name without options.
        title: Short words for headings.
        scope: ``class``: one value per class; ``task``: one value after each task; ``stream``: compares tasks;
            ``case``: over the figures of single cases, one value per class and one for all of them.
        meaning: The definition in one sentence.
        source: Where the definition comes from.
        options: Its variants.
        kinds: What has to be labelled for it to make sense: pixels (segmentation), images (classification) or either.
        unit: ``"%"``, ``"points"`` for differences of percentages, or ``"mm"``.
        better: Which direction is good.
        limits: Lowest and highest possible value where the unit does not say it; ``None`` for no limit.
    """

    name: str
    title: str
    scope: Scope
    meaning: str
    source: str
    options: tuple[Option, ...] = ()
    kinds: tuple[Kind, ...] = ("segmentation", "classification")
    unit: Unit = "%"
    better: Literal["higher", "lower"] = "higher"
    limits: tuple[float | None, float | None] | None = None

    @property
    def range(self) -> tuple[float | None, float | None]:
        """Lowest and highest possible value; ``None`` for no limit."""
        return self.limits or {"%": (0.0, 100.0), "points": (-100.0, 100.0), "mm": (0.0, None)}[self.unit]

    @property
    def bounds(self) -> str:
        """The range in words."""
        low, high = self.range
        if low is None:
            return "no limits"
        return f"from {low:g}" if high is None else f"{low:g} to {high:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """A definition with all its options chosen; ``str()`` gives the full name."""

    definition: Definition
    choices: dict[str, str]

    def __str__(self) -> str:
        shown = [o for o in self.definition.options if not (o.quiet and self.choices[o.key] == o.default)]
        parts = [self.choices[o.key] if o.bare else f"{o.key}={self.choices[o.key]}" for o in shown]
        return f"{self.definition.name}[{','.join(parts)}]" if parts else self.definition.name

    @property
    def title(self) -> str:
        """Short words for headings."""
        return self.definition.title

    @property
    def meaning(self) -> str:
        """The definition's sentence followed by what the chosen options mean."""
        return " ".join([self.definition.meaning, *(o.means(self.choices[o.key]) for o in self.definition.options)])


# fmt: off
_BG: Final = Option("bg", {
    "in": "Label 0 counts as one more class.",
    "out": "Label 0 is left out; its pixels, if any, still count against classes predicted there.",
})
_IGNORED: Final = "Pixels of label 0 are ignored: no class is wrong there (CLIP-CISS, common on ADE20K)."
_BG_OR_IGNORED: Final = Option("bg", {**_BG.meaning, "ignored": _IGNORED})
_BG_OF_NEW: Final = Option("bg", {
    "out": "Pixels of label 0 count against classes predicted there.",
    "ignored": _IGNORED,
}, quiet=True)
_ABSENT: Final = Option("absent", {
    "skip": "A class that the ground truth does not hold is left out (MiB, PLOP).",
    "zero": "A class that the ground truth does not hold counts 0 (DKD, STAR).",
})
_OF: Final = Option("of", {
    "miou": "R[t][j] is the mean IoU of the classes that task j teaches, measured after task t.",
    "dice": "R[t][j] is the mean pooled Dice of the classes that task j teaches, measured after task t.",
    "accuracy": "R[t][j] is the share of what shows task j's classes (pixels; images in classification) that is right "
                "after task t.",
    "balanced": "R[t][j] is the mean recall of the classes that task j teaches, measured after task t.",
}, quiet=True)
_FORGETTING: Final = Option("rule", {
    "max-last": "Lost is the best R[l][j] of earlier tasks l < t minus R[t][j]; below 0 if it got better (Chaudhry).",
    "best-last": "Lost is the best R[l][j] of all tasks l <= t minus R[t][j]; never below 0 (Mammoth, PyCIL).",
    "first-last": "Lost is R[j][j], right after learning, minus R[t][j] (Avalanche).",
}, bare=True)
_BWT: Final = Option("rule", {
    "last-diagonal": "Mean over earlier tasks j < t of R[t][j] - R[j][j] (GEM, Mammoth).",
    "all-pairs": "Mean over all pairs j < i <= t of R[i][j] - R[j][j] (Diaz-Rodriguez et al. 2018, continuum).",
}, bare=True)
_STATISTIC: Final = Option("statistic", {
    "mean": "The mean over the cases in which ground truth or prediction holds the class; of the model the mean over "
            "the classes seen so far.",
    "sd": "The standard deviation (n - 1) over these cases; of the model that of the cases' means over their classes.",
    "ci-low": "The lower limit of the 95 % confidence interval of the mean: percentile bootstrap over cases, 1,000 "
              "resamples, fixed seed.",
    "ci-high": "The upper limit of the 95 % confidence interval of the mean.",
}, bare=True, quiet=True)
_MM: Final = Option("unit", {
    "mm": "Only of cases whose spacing is known in mm, at their own grid and spacing.",
}, bare=True)
_TOLERANCE: Final = Option("tolerance", {"2": "Within {} mm of the other surface."}, bare=True, number=True)
_D: Final = (
    "d[t][j] is the Dice of task j after task t, in %: the mean, over the structures that task j annotates, of their "
    "mean Dice over the cases of task j's own test set."
)
_OF_KINDS: Final[dict[Kind, tuple[str, ...]]] = {"segmentation": ("miou",), "classification": ("accuracy", "balanced")}
"""Which values of ``of`` stand in a result file."""
_STAR: Final = "DKD (NeurIPS 2022), STAR (NeurIPS 2023)"
_GEM: Final = "GEM, Lopez-Paz and Ranzato (NeurIPS 2017)"
_CHAUDHRY: Final = "Chaudhry et al. (ECCV 2018)"
_ICARL: Final = "iCaRL (CVPR 2017)"
_SO_FAR: Final = "over all tasks so far, each taken right after its task."
_BENCHMARK: Final = "benchmark of continual medical segmentation (arXiv 2605.06160)"
_ONE_EMPTY: Final = (
    "A structure that only one of the two holds counts the diagonal of the image, so that missing it never makes the "
    "figure better; one in neither is left out. Label 0 has none."
)
_NO_TRUTH: Final = "of one class; undefined where the ground truth does not hold the class."
_TABLE: Final = (
    Definition("miou.all", "mIoU, all classes", "task",
               "Mean over all classes seen so far of IoU = TP / (TP + FP + FN), counts pooled over the test samples.",
               _STAR, (_BG_OR_IGNORED, _ABSENT), kinds=("segmentation",)),
    Definition("miou.old", "mIoU, first task's classes", "task",
               "Mean IoU of the classes of the first task; exists once a later task was learned.",
               _STAR, (_BG_OR_IGNORED, _ABSENT), kinds=("segmentation",)),
    Definition("miou.new", "mIoU, later classes", "task",
               "Mean IoU of all classes learned after the first task, so far.",
               _STAR, (_BG_OF_NEW, _ABSENT), kinds=("segmentation",)),
    Definition("hiou", "harmonic mIoU", "task",
               "Harmonic mean of miou.old and miou.new: 2 old new / (old + new).",
               _STAR, (_BG_OR_IGNORED, _ABSENT), kinds=("segmentation",)),
    Definition("dice.all", "Dice, all classes", "task",
               "Mean over all classes seen so far of Dice = 2 TP / (2 TP + FP + FN), counts pooled over the test "
               "samples (not a mean of one Dice per sample).",
               "Dice 1945", (_BG_OR_IGNORED, _ABSENT), kinds=("segmentation",)),
    Definition("accuracy.all", "accuracy", "task",
               "Share of what is labelled (pixels; images in classification), over all classes seen so far, that is "
               "predicted right.",
               "FCN (CVPR 2015)", (_BG,)),
    Definition("accuracy.mean", "balanced accuracy", "task",
               "Mean over all classes seen so far of recall = TP / (TP + FN): each class counts the same, however "
               "often it occurs. Also called mean class accuracy.",
               "FCN (CVPR 2015)", (_BG, _ABSENT)),
    Definition("miou.average", "mIoU, average over tasks", "stream", f"Mean of miou.all {_SO_FAR}",
               _ICARL, (_BG_OR_IGNORED, _ABSENT), kinds=("segmentation",)),
    Definition("dice.average", "Dice, average over tasks", "stream", f"Mean of dice.all {_SO_FAR}",
               _ICARL, (_BG_OR_IGNORED, _ABSENT), kinds=("segmentation",)),
    Definition("accuracy.average", "accuracy, average over tasks", "stream", f"Mean of accuracy.all {_SO_FAR}",
               _ICARL, (_BG,), kinds=("classification",)),
    Definition("balanced.average", "balanced accuracy, average over tasks", "stream",
               f"Mean of accuracy.mean {_SO_FAR}", _ICARL, (_BG, _ABSENT), kinds=("classification",)),
    Definition("forgetting", "forgetting", "stream",
               "Mean over earlier tasks j < t of what was lost on task j's classes.",
               _CHAUDHRY, (_FORGETTING, _OF), unit="points", better="lower"),
    Definition("bwt", "backward transfer", "stream",
               "What later tasks changed on earlier ones; negative means forgetting.",
               _GEM, (_BWT, _OF), unit="points"),
    Definition("intransigence", "intransigence", "stream",
               "Mean over tasks j <= t of a joint run's figure on task j's classes minus R[j][j]: what the run failed "
               "to learn. The joint run is one model trained on all tasks at once.",
               _CHAUDHRY, (_OF,), unit="points", better="lower"),
    Definition("dice.cases", "Dice over cases", "case",
               "Dice = 2 TP / (2 TP + FP + FN) of each single case. A class that only one of ground truth and "
               "prediction holds counts 0; one in neither is left out.",
               "Dice 1945", (_STATISTIC,), kinds=("segmentation",)),
    Definition("hd95", "HD95 over cases", "case",
               "Of each case the larger one of the 95th percentiles of the distances from ground truth to prediction "
               f"and back, between surface pixels. {_ONE_EMPTY}",
               "Huttenlocher et al. 1993, as in MONAI", (_MM, _STATISTIC), kinds=("segmentation",), unit="mm",
               better="lower"),
    Definition("asd", "average surface distance over cases", "case",
               "Of each case the mean distance of all surface pixels of ground truth and prediction to the surface of "
               f"the other (symmetric). {_ONE_EMPTY}",
               "MONAI, symmetric=True", (_MM, _STATISTIC), kinds=("segmentation",), unit="mm", better="lower"),
    Definition("nsd", "surface Dice over cases", "case",
               "Of each case the share of all surface pixels of ground truth and prediction that lie near the surface "
               "of the other. A structure that only one of the two holds counts 0; one in neither is left out. Label 0 "
               "has none.",
               "Nikolov et al. 2018, as in MONAI (use_subvoxels=False)", (_MM, _TOLERANCE, _STATISTIC),
               kinds=("segmentation",)),
    Definition("dice.tasks", "A-Dice", "task", f"Mean over tasks j <= t of d[t][j]. {_D}",
               f"A-Dice of the {_BENCHMARK}", kinds=("segmentation",)),
    Definition("wcd", "whole-class Dice", "task",
               "Mean over all classes seen so far of their mean Dice over the cases of all test sets, in the one "
               "output of the model, without label 0: a model that confuses classes of two tasks can win dice.tasks "
               "and lose this.",
               f"WCD of the {_BENCHMARK}", kinds=("segmentation",)),
    Definition("bwtr", "relative backward transfer", "stream",
               f"Mean over earlier tasks j < t of (d[t][j] - d[j][j]) / d[j][j]; negative means forgetting. {_D}",
               f"BWTR of the {_BENCHMARK}", kinds=("segmentation",), limits=(-100.0, None)),
    Definition("rma", "relative plasticity", "stream",
               "Mean over tasks j from the second to t of d[j][j] / d of a model that learned task j alone (a run of "
               f"the method 'independent' on the same stream). {_D}",
               f"RMA of the {_BENCHMARK}, with the division that its text has and its code lacks",
               kinds=("segmentation",), limits=(0.0, None)),
    Definition("e-fwt", "forward generalisation", "stream",
               "Mean over pairs of tasks l < j <= t of d[l][j] minus the Dice of the untrained model on task j, for "
               "streams whose tasks all annotate the same classes. Earlier models are measured on the test cases of "
               f"task j when it begins. {_D}",
               f"E-FWT of the {_BENCHMARK}", kinds=("segmentation",), unit="points"),
    Definition("fwt", "forward transfer", "stream",
               "Mean over later tasks j <= t of the mean IoU of the classes that task j teaches, measured on the test "
               "samples right before task j by a model that is told their names only (zero-shot). Nothing is "
               "subtracted for an untrained model. Methods that read no names give such classes no output.",
               _GEM, kinds=("segmentation",)),
    Definition("mpe", "growth of the model", "stream",
               "Mean over later tasks t of (P_t - P_(t-1)) / P_1, P_t being the number of floating-point values in the "
               "weights after task t: parameters, and running statistics of normalisation layers.",
               f"MPE of the {_BENCHMARK}", better="lower", limits=(None, None)),
    Definition("drr", "replay burden", "stream",
               "Mean over later tasks of the number of replayed samples, raw or synthetic, divided by that of new "
               "training samples. Features drawn from statistics are no samples.",
               f"DRR of the {_BENCHMARK}", better="lower", limits=(0.0, None)),
    Definition("forgetting.appearance", "forgetting of appearance", "stream",
               "Points of Dice that were lost on earlier test sets on structures that a later task annotates too, such "
               "as the same organ from another scanner. R[l][j] is d[l][j] over those structures of task j that a task "
               f"from j + 1 to t annotates; mean over tasks j < t that have any. {_D}",
               _CHAUDHRY, (_FORGETTING,), kinds=("segmentation",), unit="points", better="lower"),
    Definition("forgetting.semantics", "forgetting of semantics", "stream",
               "Points of Dice that were lost on structures that no later task annotates. R[l][j] is d[l][j] over "
               "those structures of task j that no task from j + 1 to t annotates; mean over tasks j < t that have "
               f"any. {_D}",
               _CHAUDHRY, (_FORGETTING,), kinds=("segmentation",), unit="points", better="lower"),
    Definition("iou", "IoU", "class", f"TP / (TP + FP + FN) {_NO_TRUTH}", "Jaccard 1912", kinds=("segmentation",)),
    Definition("dice", "Dice", "class", f"2 TP / (2 TP + FP + FN) {_NO_TRUTH}", "Dice 1945", kinds=("segmentation",)),
    Definition("recall", "recall", "class", f"TP / (TP + FN) {_NO_TRUTH}", "-"),
    Definition("precision", "precision", "class",
               "TP / (TP + FP) of one class; undefined where the class is never predicted.", "-"),
)
# fmt: on
DEFINITIONS: Final[dict[str, Definition]] = {d.name: d for d in _TABLE}


def figure(text: str, background: bool = True) -> Figure:
    """Parse a figure's name; options that are not written get their default.

    Args:
        text: E.g. ``"miou.all[bg=in,absent=skip]"``, ``"miou.all"`` or ``"forgetting[max-last]"``.
        background: Whether the data has a background: decides the default of ``bg``.

    Raises:
        UsageError: Unknown name, option or value; says the nearest one.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is not a figure's name", "write it like miou.all[bg=in,absent=skip]")
    definition = DEFINITIONS.get(match[1])
    if definition is None:
        raise UsageError(f"unknown figure '{match[1]}'", nearest(match[1], DEFINITIONS))
    options = {o.key: o for o in definition.options}
    chosen = {key: option.default for key, option in options.items()}
    if "bg" in chosen and not background:
        chosen["bg"] = "out"  # which miou.new has anyway
    given: set[str] = set()
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:  # the value alone: of the option that may be written so
            value, key = key, next((o.key for o in definition.options if o.bare and o.known(key) is not None), "")
        if not options:
            raise UsageError(f"figure '{definition.name}' has no options", f"write '{definition.name}' alone")
        if key == "of" and definition.name == "accuracy.average":  # it was one figure for all means over tasks
            averages = {"miou": "miou", "dice": "dice", "balanced": "balanced"}
            hint = f"write {averages.get(value, 'accuracy')}.average, which has no option 'of'"
            raise UsageError(f"figure 'accuracy.average' has no option '{part}'", hint)
        if key not in options:
            known = [v if o.bare else f"{o.key}={v}" for o in definition.options for v in o.meaning]
            raise UsageError(f"figure '{definition.name}' has no option '{part}'", nearest(part, known))
        written = options[key].known(value)
        if written is None:
            hint = "give a number above 0" if options[key].number else nearest(value, options[key].meaning)
            raise UsageError(f"'{definition.name}' has no {key}={value}", hint)
        if key in given:
            raise UsageError(f"option '{key}' is given twice in '{text}'", "give each option once")
        given.add(key)
        chosen[key] = written
    return Figure(definition, chosen)


def fitting(wanted: Figure, kind: Kind) -> Figure:
    """The figure itself. Raises UsageError with the nearest name where it makes no sense for the kind of labels."""
    if kind not in wanted.definition.kinds:
        others = [d.name for d in _TABLE if kind in d.kinds and d.scope == wanted.definition.scope]
        last = wanted.definition.name.rpartition(".")[2]
        alike = next((name for name in others if name.endswith(f".{last}")), None)
        hint = f"did you mean '{alike}'?" if alike else nearest(wanted.definition.name, others)
        raise UsageError(f"the figure '{wanted}' is not for {kind}", hint)
    return wanted


def variants(definition: Definition, kind: Kind = "segmentation", tolerance: float = TOLERANCE) -> list[Figure]:
    """Variants of a definition that stand in the result file of a run; none where it makes no sense for the kind.

    The option ``of`` takes what fits the kind. Images with one class have no background, so ``bg`` is ``out`` there.
    Surface Dice has the tolerance, in mm, that the run measured with.
    """
    if kind not in definition.kinds:
        return []
    combined: list[dict[str, str]] = [{}]
    for option in definition.options:
        values: Sequence[str] = list(option.meaning)
        if option.key == "of":
            values = _OF_KINDS[kind]
        elif option.key == "bg" and kind == "classification":
            values = ["out"]
        elif option.number:
            values = [f"{tolerance:g}"]
        combined = [chosen | {option.key: value} for chosen in combined for value in values]
    return [Figure(definition, chosen) for chosen in combined]


def describe() -> list[dict[str, Any]]:
    """Return the whole table as plain values, for ``perdure list metrics --json`` and the docs."""
    return [
        {
            "name": d.name,
            "title": d.title,
            "scope": d.scope,
            "per": "class, and model" if d.scope == "case" else d.scope,
            "meaning": d.meaning,
            "unit": d.unit,
            "range": list(d.range),
            "bounds": d.bounds,
            "better": d.better,
            "source": d.source,
            "kinds": list(d.kinds),
            "default": str(figure(d.name)),
            "options": [
                {"name": o.key, "default": o.default, "values": {v: o.means(v) for v in o.meaning}} for o in d.options
            ],
        }
        for d in _TABLE
    ]
