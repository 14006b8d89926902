"""What a method is: a module with a few members, described by :class:`Method`.

Being a module is the whole of its memory: parameters and buffers are saved when a task is sealed and in the
middle of a phase, and restored from there; files that it keeps are referenced (:mod:`perdure.kept.items`). Frozen
copies of earlier networks are made again in ``begin``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Generic, Literal, Self, TypeVar

from torch import Tensor

from perdure.data.source import Kind
from perdure.engine.phases import Phase
from perdure.engine.state import Stateful
from perdure.errors import UsageError
from perdure.kept.items import Kept
from perdure.methods.options import Options, Setup
from perdure.methods.prediction import Prediction
from perdure.networks.frozen import Frozen
from perdure.streams.task import Task

OptionsT = TypeVar("OptionsT", bound=Options)
Recurring = Literal["learned", "beside_new", "refused"]


class Method(Stateful, ABC, Generic[OptionsT]):
    """A way to learn the next task and keep the past.

    A subclass names its ``Options`` and the kinds of data that it can learn, builds its network from
    ``setup.network(TYPE)`` and registers what it keeps as buffers. Memory too large for that goes into files: a
    Generate phase writes them, ``files`` names them, ``store.paths(self.files[...])`` finds them and
    :class:`~perdure.data.tensors.FileSamples` reads them one by one.

    Attributes:
        Options: Typed settings that a recipe may give under ``method``.
        kinds: What it can learn: segmentation, classification or both.
        sees_all_tasks: True for upper bounds that train on all tasks at once; the stream is then merged.
        averages_images: True where it keeps statistics that look like images, such as class means. Of patients they
            need many images per class (``Kept.from_images``), which is then checked before anything is trained. May
            depend on the options.
        recurring: Whether it can use labels of classes that an earlier task taught: learn them, also in a task that
            teaches no new class; bear them in a task that teaches new ones (``beside_new``); or neither. A stream that
            asks for more is refused before anything is trained. May depend on the options.
        most_classes: Classes that one task may annotate; ``None`` for any number. May depend on the options.
        reads_names: Whether it can predict a class from its name before it learns it (:meth:`add_names`).
        options: This run's settings.
        training_options: Settings of optimisation, shared by all methods.
        class_ids: Classes seen so far in learning order; a method sets them in ``begin``.
    """

    Options: ClassVar[type[Options]] = Options
    kinds: ClassVar[frozenset[Kind]] = frozenset({"segmentation"})
    sees_all_tasks: ClassVar[bool] = False
    averages_images: bool = False
    recurring: Recurring = "learned"
    most_classes: int | None = None
    reads_names: ClassVar[bool] = False

    def __init__(self, setup: Setup[OptionsT]) -> None:
        super().__init__()
        self.options = setup.options
        self.training_options = setup.training
        self.class_ids: tuple[int, ...] = ()

    @abstractmethod
    def begin(self, task: Task) -> None:
        """Get ready for a task: freeze a copy of the old network, grow the new one. Reads no data."""

    @abstractmethod
    def phases(self, task: Task) -> Iterable[Phase]:
        """The stages of the work on the task, in order.

        A generator may decide as it goes: what stands after a ``yield`` runs when that phase is done. Such a decision
        has to follow from saved state (a buffer that later phases leave alone), because a resumed run takes it again.
        """

    @abstractmethod
    def predict(self, images: Tensor) -> Prediction:
        """Scores of images ``(N, C, *S)`` at the input's size, for all classes seen so far."""

    def add_names(self, names: Mapping[int, str]) -> None:
        """Predict further classes too, by id, that are known by name alone; until the next task begins.

        Raises:
            UsageError: The method knows classes from training only.
        """
        raise UsageError(
            f"the model of this run cannot predict '{next(iter(names.values()))}': it knows classes from training only",
            "leave --classes out; methods that read names: clip_ciss",
        )

    @property
    def replayed(self) -> int:
        """Samples of earlier tasks, raw or synthetic, that the present task trained on; asked when it is sealed."""
        return 0

    def kept(self) -> Sequence[Kept]:
        """What besides the network's weights crosses the task boundary."""
        return ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move frozen copies along: ``to(device)`` and changes of memory layout all pass through here."""
        for part in (part for module in self.modules() for part in vars(module).values()):
            if isinstance(part, Frozen):
                part.module._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        return self
