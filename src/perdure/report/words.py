"""What pages say of segmentation and what of classification, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from perdure.metrics.figures import headline
from perdure.streams.description import DescribedStream

if TYPE_CHECKING:
    from perdure.data.source import Kind


@dataclass(frozen=True)
class Words:
    """Figures and words for one kind of labels.

    Args:
        by_class: The figure of one class in heat maps.
        title: Its short name.
        of: What R[t][j] measures: option ``of`` of figures over tasks.
        quality: Short name of that figure.
        forgetting: Full name of the headline's forgetting.
        intransigence: Full name of the figure that is added beside a joint run.
        one: What is labelled.
        many: Several of them.
        curves: Figures of the comparison's plots.
    """

    by_class: str
    title: str
    of: str
    quality: str
    forgetting: str
    intransigence: str
    one: str
    many: str
    curves: tuple[str, ...]


_WORDS: Final[dict[Kind, Words]] = {
    "segmentation": Words(
        by_class="iou",
        title="IoU",
        of="miou",
        quality="mIoU",
        forgetting="forgetting[max-last]",
        intransigence="intransigence",
        one="pixel",
        many="pixels",
        curves=("miou.all", "miou.old", "miou.new", "forgetting[max-last]"),
    ),
    "classification": Words(
        by_class="recall",
        title="recall",
        of="accuracy",
        quality="accuracy",
        forgetting="forgetting[max-last,of=accuracy]",
        intransigence="intransigence[of=accuracy]",
        one="image",
        many="images",
        curves=("accuracy.all", "accuracy.mean", "forgetting[max-last,of=accuracy]"),
    ),
}
TRANSDUCTIVE: Final = (
    "the protocol is transductive: test images, without their labels, take part in training, so figures may be better "
    "than on images that the model never met"
)


def words(stream: DescribedStream) -> Words:
    """The words for a stream's kind of labels."""
    return _WORDS[stream.kind]


def explained(stream: DescribedStream) -> list[str]:
    """Figures that a report of the stream shows, by full name."""
    return [*headline(stream), words(stream).by_class]


def warning(stream: DescribedStream) -> str | None:
    """What a reader has to know of the protocol before believing the figures."""
    return TRANSDUCTIVE if "transductive" in stream.protocol else None
