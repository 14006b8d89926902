"""The command line. Nothing heavy is imported before a verb starts its work: help answers in a fraction of a second."""

from __future__ import annotations

import os
import sys
import traceback

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
        code = app(arguments, standalone_mode=False)
        if code != INTERRUPTED:
            return int(code or 0)
        error: BaseException = KeyboardInterrupt()
    except BrokenPipeError:  # the reader of the output has left, as in `perdure list recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001  # the last place to make it readable
        error = raised
        # a traceback cannot help where the words of the command themselves are wrong, or on Ctrl-C
        if debug and not (isinstance(error, KeyboardInterrupt) or hasattr(error, "format_message")):
            traceback.print_exc()
    what, hint, status = _explained(error)
    lines = [f"error: {' '.join(what.splitlines())}", f"       {' '.join(hint.splitlines())}"]
    sys.stderr.write("\n".join(lines[: 2 if hint else 1]) + "\n")
    return status


def _explained(error: BaseException) -> tuple[str, str, int]:
    """What is wrong, what to try, and the exit code."""
    smaller = "try a smaller training.batch_size or augment.crop"
    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
    match error:
        case PerdureError():
            return error.what, error.hint, error.exit_code
        case MemoryError():
            return "out of memory", smaller, 1
        case OSError(strerror=str(reason), filename=place) if reason:
            return f"{reason}: {place}" if place else reason, "check the path, its rights and the free disk", 1
    if isinstance(error, KeyboardInterrupt) or kind == "Abort":
        return "stopped", "", 1
    if kind == "OutOfMemoryError":  # torch's; torch is not imported for its name
        return "the GPU is out of memory", f"{smaller}, or engine.precision=bf16", 1
    if hasattr(error, "format_message"):  # typer's usage errors; their classes have moved between its versions
        context = error.ctx if hasattr(error, "ctx") else None
        help_of = "perdure" if context is None else context.command_path
        return " ".join(error.format_message().split())[:300], f"see {help_of} --help", 2
    return f"unexpected {kind}: {text}", "this is a bug; --debug shows where", 1
