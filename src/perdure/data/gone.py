"""A data set that a model has learned and that is no longer there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from perdure.data.source import Image, Kind, Mask, Source, Split
from perdure.errors import DataError
from perdure.labels import LabelSpace


class GoneSource(Source):
    """Knows the classes of a data set and nothing of its images; to read any is an error.

    Args:
        name: Name of its task.
        kind: What its labels describe.
        space: The classes that it annotates, in learning order.
        patients: Whether its images came from patients.
    """

    other_label = 0

    def __init__(self, name: str, kind: Kind, space: LabelSpace, patients: bool) -> None:
        self.name, self.kind, self.space, self.patients = name, kind, space, patients

    def names(self, split: Split) -> Sequence[str]:  # noqa: ARG002
        """See :class:`~perdure.data.source.Source`."""
        self._refuse()

    def image(self, split: Split, name: str) -> Image:  # noqa: ARG002
        """See :class:`~perdure.data.source.Source`."""
        self._refuse()

    def mask(self, split: Split, name: str) -> Mask:  # noqa: ARG002
        """See :class:`~perdure.data.source.Source`."""
        self._refuse()

    def fingerprint(self, split: Split) -> str:  # noqa: ARG002
        """See :class:`~perdure.data.source.Source`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise DataError(f"the data of task '{self.name}' is not at hand", "it was learned before; nothing needs it")
