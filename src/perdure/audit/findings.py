"""What an audit found: every kept item, every byte by kind, and one line for each thing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from perdure.errors import NewerVersionError, PerdureError
from perdure.kept.ledger import Entry


class Item(Entry):
    """An entry of a task's ledger, with the folder name of the task."""

    task: str


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        items: Every ledger entry, with its task.
        bytes_by_kind: Bytes kept after the last sealed task, by kind.
        files: Every byte of the folder: number of files and bytes, by kind.
        min_images: From how many images statistics that look like images have to come; ``None`` where the images are
            not of patients.
        signed: Whether there is a signature; whether it holds is known with the public key only.
        signature_holds: Whether it is one of the given key over the list of files; ``None`` where no key was given.
        problems: One plain line for each thing that is wrong; empty means the audit passed.
        notes: What could not be checked, one plain line each.
    """

    items: list[Item] = field(default_factory=list)
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    min_images: int | None = None
    signed: bool = False
    signature_holds: bool | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _told: set[str] = field(default_factory=set, repr=False)

    @property
    def passed(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def tell(self, place: str, what: str | None) -> None:
        """Add a problem of a file, unless there is none; the first one of a file is enough."""
        if what is not None and place not in self._told:
            self._told.add(place)
            self.problems.append(f"{place}: {what}")

    def check(self, place: str, check: Callable[[], str | None]) -> None:
        """Tell what a check of a file says, or why it cannot say anything.

        Raises:
            NewerVersionError: The file is of a newer version.
        """
        try:
            self.tell(place, check())
        except NewerVersionError:
            raise
        except PerdureError as error:
            self.tell(place, f"cannot be used: {error.what.partition(place)[2].strip() or error.what}")
        except Exception as error:  # noqa: BLE001 - of whatever sort: one bad file must not hide what is wrong with the others
            self.tell(place, f"cannot be checked: {' '.join(str(error).split())[:200] or type(error).__name__}")

    def guard(self, what: str, look: Callable[[], None]) -> None:
        """Look at a part of the run; that something keeps it from an end is a problem, and the other parts follow."""
        try:
            look()
        except PerdureError:
            raise
        except Exception as error:  # noqa: BLE001 - as in check()
            self.problems.append(f"{what} cannot be checked: {' '.join(str(error).split())[:200]}")

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        plain = asdict(self)
        del plain["_told"]
        return {"passed": self.passed, **plain}
