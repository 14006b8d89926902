"""Numbers of a task that do not follow from its counts: ``numbers.json``, which is written where there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perdure.errors import DataError
from perdure.files import read_json

DIGITS: Final = 6
"""After the point, of Dice: a sum in another order gives the same file."""
MOST_REPLAYED: Final = 10**9
Percent = Annotated[float, Field(ge=0, le=100)]


class TaskNumbers(BaseModel):
    """What was measured or counted while a task was learned.

    Attributes:
        untrained: Dice in percent of the untrained model on the test cases of the task's own data set: the mean over
            its structures of their mean over the cases. ``None`` where it was not measured, or no case shows one.
        earlier: The same of the model after each earlier task, in order; empty where it was not measured.
        named: Mean IoU in percent of the task's new classes by the model before it, which was told their names;
            ``None`` where the method reads no names, or no test sample shows one.
        replayed: Samples of earlier tasks, raw or synthetic, that took part in training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    untrained: Percent | None = None
    earlier: tuple[Percent | None, ...] = ()
    named: Percent | None = None
    replayed: int = Field(0, ge=0, le=MOST_REPLAYED)


def read_numbers(path: Path) -> TaskNumbers:
    """Read ``numbers.json``. Raises DataError where it is missing or damaged."""
    try:
        return TaskNumbers.model_validate(read_json(path))
    except ValidationError as error:
        raise DataError(
            f"{path} does not hold numbers of a task: {error.errors()[0]['msg']}",
            "the file was changed or is damaged: restore it",
        ) from error
