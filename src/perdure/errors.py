"""Errors that a user can act on: what is wrong, where, and what to try.

The command line prints them as one or two lines and exits with ``exit_code``. Any other exception that reaches it is a
bug.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

DIRECTION: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the direction of writing: a name with one reads as another name."""
INVISIBLE: Final = frozenset("\u00ad\u200b\u2060\ufeff")
"""Characters that nobody sees: two names that differ by one read as the same. Joiners are not among them: some
scripts need these."""


class PerdureError(Exception):
    """An error with an explanation for the user.

    Args:
        what: One line: what is wrong and where (file, key, line).
        hint: One line: what to try. May be empty.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint

    def __reduce__(self) -> tuple[type[PerdureError], tuple[str, str]]:
        """Pickle both lines: exceptions of worker processes reach the main process this way."""
        return type(self), (self.what, self.hint)


class UsageError(PerdureError):
    """The command or the recipe is wrong. Nothing was started."""

    exit_code = 2


class DataError(PerdureError):
    """A file or a data set cannot be used."""


class NewerVersionError(DataError):
    """A file was written by a later version of this program, in a form that this one does not know."""


class SealedDataError(PerdureError):
    """Training data of a task was opened while the task was not the current one."""


class RunError(PerdureError):
    """A run folder is missing, locked, damaged, or made by another recipe."""


class Interrupted(PerdureError):
    """Somebody asked the program to stop; what was under way is told, and how to go on."""


@contextmanager
def stoppable(doing: str, hint: str) -> Iterator[None]:
    """Ctrl-C inside tells what was under way, ``doing`` after "stopped while", and how to go on.

    Where it is nested, the inner one is told: it becomes an error at once, because typer would end the program without
    a word of where it was.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped while {doing}", hint) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the known word nearest to ``word``, or the list of known words."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(words)}"


def odd(letter: str) -> bool:
    """True for a character that no name may hold: controls, what is not seen or turns the writing, no UTF-8."""
    return letter in DIRECTION or letter in INVISIBLE or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


def plain(text: str) -> str:
    r"""Text in one line in which no character commands a terminal: such ones are shown as escapes, like ``\x1b``.

    Names of files, folders and classes may come from somebody else, and a terminal obeys the sequences in them.
    """
    shown = " ".join(text.splitlines()) if any(map(odd, text)) else text
    return "".join(_escape(letter) if odd(letter) else letter for letter in shown)


def _escape(letter: str) -> str:
    if unicodedata.category(letter) == "Cs":  # a byte of a file name that is not UTF-8, as Python holds it
        return os.fsencode(letter).decode(errors="backslashreplace") if "\udc80" <= letter <= "\udcff" else "\\ud800"
    return letter.encode("unicode_escape").decode("ascii")
