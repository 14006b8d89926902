"""The command line: one small file a verb. Nothing heavy is imported before a verb starts its work."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from perdure.cli.app import app
from perdure.errors import PerdureError

INTERRUPTED = 130


def main() -> None:
    """Run the command line; failures are one or two plain lines, a traceback only with ``--debug``."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin while data is read
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    code = _run(arguments or ["--help"], debug)
    sys.exit(code if arguments else 2)


def _run(arguments: list[str], debug: bool) -> int:
    """Run a command; return its exit code when its error, and all that the error held on to, is let go."""
    try:
        code: Any = app(arguments, standalone_mode=False)
    except BrokenPipeError:  # whoever read the output has left, as in `perdure list recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the last place to make it readable
        if debug and _unforeseen(error):
            traceback.print_exc()
        return _complain(error)
    return _complain(KeyboardInterrupt()) if code == INTERRUPTED else int(code or 0)


def _complain(error: BaseException) -> int:
    """Say in one or two lines what is wrong and what to try; return the exit code."""
    what, hint, code = _explained(error)
    lines = [f"error: {' '.join(what.splitlines())}", f"       {' '.join(hint.splitlines())}"]
    sys.stderr.write("\n".join(lines[: 2 if hint else 1]) + "\n")
    return code


def _unforeseen(error: BaseException) -> bool:
    """Whether a traceback can help: not where the words of the command themselves are wrong, or on Ctrl-C."""
    return not (isinstance(error, KeyboardInterrupt) or hasattr(error, "format_message"))


def _explained(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, PerdureError):
        return error.what, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "stopped", "", 1
    if hasattr(error, "format_message"):  # typer's usage errors; their classes have moved between its versions
        context = getattr(error, "ctx", None)
        help_of = context.command_path if context is not None else "perdure"
        return _one_line(error.format_message()), f"see {help_of} --help", 2
    if isinstance(error, MemoryError):
        return "out of memory", "try a smaller training.batch_size or augment.crop", 1
    if type(error).__name__ == "OutOfMemoryError":
        hint = "try a smaller training.batch_size or augment.crop, or engine.precision=bf16"
        return "the GPU is out of memory", hint, 1
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}", "check the path, its rights and the free disk", 1
    return f"unexpected {type(error).__name__}: {_one_line(str(error))}", "this is a bug; --debug shows where", 1


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
