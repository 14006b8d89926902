"""What every figure means, once: the table behind ``perdure list metrics``, the reports and the docs.

A figure's full name carries its definition, e.g. ``miou.all[bg=in,absent=skip]``. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from perdure.errors import UsageError, nearest

if TYPE_CHECKING:
    from perdure.data.source import Kind

Scope = Literal["class", "task", "stream"]
_NAME: Final = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[(.*)\])?\s*")


@dataclass(frozen=True, slots=True)
class Option:
    """One choice within a definition.

    Args:
        key: Its name, e.g. ``"bg"``.
        meaning: Value -> sentence. The first value is the default.
        bare: Written as the value alone (``forgetting[max-last]``) instead of ``key=value``.
        quiet: Left out of the full name where it has its default.
    """

    key: str
    meaning: dict[str, str]
    bare: bool = False
    quiet: bool = False

    @property
    def default(self) -> str:
        """The value that holds where none is written."""
        return next(iter(self.meaning))


@dataclass(frozen=True, slots=True)
class Definition:
    """A figure and its definition.

    Args:
        name: Name without options.
        title: Short words for headings.
        scope: ``class``: one value per class; ``task``: one value after each task; ``stream``: compares tasks.
        meaning: The definition in one sentence.
        source: Where the definition comes from.
        options: Its variants.
        kinds: What has to be labelled for it to make sense: pixels (segmentation), images (classification) or either.
        unit: ``"%"``, or ``"points"`` for differences of percentages.
        better: Which direction is good.
    """

    name: str
    title: str
    scope: Scope
    meaning: str
    source: str
    options: tuple[Option, ...] = ()
    kinds: tuple[Kind, ...] = ("segmentation", "classification")
    unit: Literal["%", "points"] = "%"
    better: Literal["higher", "lower"] = "higher"

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest possible value."""
        return (0.0, 100.0) if self.unit == "%" else (-100.0, 100.0)


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
        return " ".join([self.definition.meaning, *(o.meaning[self.choices[o.key]] for o in self.definition.options)])


# fmt: off
_BG: Final = Option("bg", {
    "in": "Label 0 counts as one more class.",
    "out": "Label 0 is left out; its pixels, if any, still count against classes predicted there.",
})
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
_OF_KINDS: Final[dict[Kind, tuple[str, ...]]] = {"segmentation": ("miou",), "classification": ("accuracy", "balanced")}
"""Which values of ``of`` stand in a result file."""
_STAR: Final = "DKD (NeurIPS 2022), STAR (NeurIPS 2023)"
_GEM: Final = "GEM, Lopez-Paz and Ranzato (NeurIPS 2017)"
_CHAUDHRY: Final = "Chaudhry et al. (ECCV 2018)"
_ICARL: Final = "iCaRL (CVPR 2017)"
_SO_FAR: Final = "over all tasks so far, each taken right after its task."
_NO_TRUTH: Final = "of one class; undefined where the ground truth does not hold the class."
_TABLE: Final = (
    Definition("miou.all", "mIoU, all classes", "task",
               "Mean over all classes seen so far of IoU = TP / (TP + FP + FN), counts pooled over the test samples.",
               _STAR, (_BG, _ABSENT), kinds=("segmentation",)),
    Definition("miou.old", "mIoU, first task's classes", "task",
               "Mean IoU of the classes of the first task; exists once a later task was learned.",
               _STAR, (_BG, _ABSENT), kinds=("segmentation",)),
    Definition("miou.new", "mIoU, later classes", "task",
               "Mean IoU of all classes learned after the first task, so far.",
               _STAR, (_ABSENT,), kinds=("segmentation",)),
    Definition("hiou", "harmonic mIoU", "task",
               "Harmonic mean of miou.old and miou.new: 2 old new / (old + new).",
               _STAR, (_BG, _ABSENT), kinds=("segmentation",)),
    Definition("dice.all", "Dice, all classes", "task",
               "Mean over all classes seen so far of Dice = 2 TP / (2 TP + FP + FN), counts pooled over the test "
               "samples (not a mean of one Dice per sample).",
               "Dice 1945", (_BG, _ABSENT), kinds=("segmentation",)),
    Definition("accuracy.all", "accuracy", "task",
               "Share of what is labelled (pixels; images in classification), over all classes seen so far, that is "
               "predicted right.",
               "FCN (CVPR 2015)", (_BG,)),
    Definition("accuracy.mean", "balanced accuracy", "task",
               "Mean over all classes seen so far of recall = TP / (TP + FN): each class counts the same, however "
               "often it occurs. Also called mean class accuracy.",
               "FCN (CVPR 2015)", (_BG, _ABSENT)),
    Definition("miou.average", "mIoU, average over tasks", "stream", f"Mean of miou.all {_SO_FAR}",
               _ICARL, (_BG, _ABSENT), kinds=("segmentation",)),
    Definition("dice.average", "Dice, average over tasks", "stream", f"Mean of dice.all {_SO_FAR}",
               _ICARL, (_BG, _ABSENT), kinds=("segmentation",)),
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
    Definition("iou", "IoU", "class", f"TP / (TP + FP + FN) {_NO_TRUTH}", "Jaccard 1912", kinds=("segmentation",)),
    Definition("dice", "Dice", "class", f"2 TP / (2 TP + FP + FN) {_NO_TRUTH}", "Dice 1945", kinds=("segmentation",)),
    Definition("recall", "recall", "class", f"TP / (TP + FN) {_NO_TRUTH}", "-"),
    Definition("precision", "precision", "class",
               "TP / (TP + FP) of one class; undefined where the class is never predicted.", "-"),
)
# fmt: on
DEFINITIONS: Final[dict[str, Definition]] = {d.name: d for d in _TABLE}
NOT_OFFERED: Final = {
    "fwt": "a class has no output before its task teaches it, so forward transfer would be 0 by construction",
}
"""Figures of the field that are not computed here, and why."""


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
    if definition is None and match[1] in NOT_OFFERED:
        raise UsageError(f"the figure '{match[1]}' is not offered", NOT_OFFERED[match[1]])
    if definition is None:
        raise UsageError(f"unknown figure '{match[1]}'", nearest(match[1], DEFINITIONS))
    options = {o.key: o for o in definition.options}
    chosen = {key: option.default for key, option in options.items()}
    if "bg" in chosen and not background:
        chosen["bg"] = "out"
    given: set[str] = set()
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:  # the value alone: of the option that may be written so
            value, key = key, next((o.key for o in definition.options if o.bare and key in o.meaning), "")
        if not options:
            raise UsageError(f"figure '{definition.name}' has no options", f"write '{definition.name}' alone")
        if key == "of" and definition.name == "accuracy.average":  # it was one figure for all means over tasks
            averages = {"miou": "miou", "dice": "dice", "balanced": "balanced"}
            hint = f"write {averages.get(value, 'accuracy')}.average, which has no option 'of'"
            raise UsageError(f"figure 'accuracy.average' has no option '{part}'", hint)
        if key not in options:
            known = [v if o.bare else f"{o.key}={v}" for o in definition.options for v in o.meaning]
            raise UsageError(f"figure '{definition.name}' has no option '{part}'", nearest(part, known))
        if value not in options[key].meaning:
            raise UsageError(f"'{definition.name}' has no {key}={value}", nearest(value, options[key].meaning))
        if key in given:
            raise UsageError(f"option '{key}' is given twice in '{text}'", "give each option once")
        given.add(key)
        chosen[key] = value
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


def variants(definition: Definition, kind: Kind = "segmentation") -> list[Figure]:
    """Variants of a definition that stand in the result file of a run; none where it makes no sense for the kind.

    The option ``of`` takes what fits the kind. Images with one class have no background, so ``bg`` is ``out`` there.
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
        combined = [chosen | {option.key: value} for chosen in combined for value in values]
    return [Figure(definition, chosen) for chosen in combined]


def describe() -> list[dict[str, Any]]:
    """Return the whole table as plain values, for ``perdure list metrics --json`` and the docs."""
    return [
        {
            "name": d.name,
            "title": d.title,
            "scope": d.scope,
            "meaning": d.meaning,
            "unit": d.unit,
            "range": list(d.range),
            "better": d.better,
            "source": d.source,
            "kinds": list(d.kinds),
            "default": str(figure(d.name)),
            "options": [{"name": o.key, "default": o.default, "values": dict(o.meaning)} for o in d.options],
        }
        for d in _TABLE
    ]
