"""The command line. Nothing heavy is imported before a verb starts its work: help answers in a fraction of a second."""

from __future__ import annotations

import os
import sys
import traceback
import warnings

from perdure.cli.app import app
from perdure.errors import PerdureError, plain

INTERRUPTED = 130


def main() -> None:
    """Run the command line; failures are one or two plain lines, a traceback only with ``--debug``."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin while data is read
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # large photographs are not unusual
    # nnU-Net's networks hold timm at a version that says this whenever it is imported
    warnings.filterwarnings("ignore", message=".*torch.jit.interface.* is deprecated", category=FutureWarning)
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
    what, hint, status = _explained(error, next((a for a in arguments if not a.startswith("-")), ""))
    lines = [f"error: {plain(what)}", f"       {plain(hint)}"]
    sys.stderr.write("\n".join(lines[: 2 if hint else 1]) + "\n")
    return status


_NO_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "alloc_failed",
    "unable to allocate",
)
"""Words in the errors of torch, CUDA's libraries and NumPy, in small letters."""


def _explained(error: BaseException, verb: str) -> tuple[str, str, int]:
    """What is wrong, what to try, and the exit code."""
    smaller = "try a smaller training.batch_size, augment.crop or evaluate.window (of volumes: volumes.patch)"
    if verb == "predict":
        smaller = "try smaller images, or fewer other programs beside it"
    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
    match error:
        case PerdureError():
            return error.what, error.hint, error.exit_code
        case MemoryError():
            return "the machine is out of memory", smaller, 1
        case RecursionError():
            return "a file is nested too deeply to be read", "it is damaged, or made to do harm", 1
        case OSError(strerror=str(reason), filename=place) if reason:
            return f"{reason}: {place}" if place else reason, "check the path, its rights and the free disk", 1
        case OSError():  # of Pillow and others, which say in words what they could not read
            return f"a file cannot be read or written: {text}", "it may be damaged; --debug shows which", 1
        case UnicodeError():
            return f"a name or a file is not UTF-8 text: {text}", "rename it, or save it as UTF-8", 1
        case ValueError() if "null byte" in text or "null character" in text:
            return "a path holds the character NUL", "correct the path", 2
    if isinstance(error, KeyboardInterrupt) or kind == "Abort":
        return f"perdure {verb} was stopped", "the same command begins anew", 1
    if kind == "OutOfMemoryError":  # torch's; torch is not imported for its name
        gpu = "run `perdure predict` with --device cpu" if verb == "predict" else f"{smaller}, or engine.precision=bf16"
        return "the GPU is out of memory", gpu, 1
    if isinstance(error, RuntimeError):
        if any(words in text.lower() for words in _NO_MEMORY):
            return "the machine is out of memory", smaller, 1
        if "DataLoader worker" in text:  # the machine ended it, most often because memory ran out
            return "a process that reads data was ended by the machine", "try fewer engine.workers, 0 for none", 1
        if "home directory" in text:
            return "a path begins with ~ and a user that does not exist", "write the whole path", 2
    if hasattr(error, "format_message"):  # typer's usage errors; their classes have moved between its versions
        context = error.ctx if hasattr(error, "ctx") else None
        help_of = "perdure" if context is None else context.command_path
        return " ".join(error.format_message().split())[:300], f"see {help_of} --help", 2
    return f"unexpected {kind}: {text}", "this is a bug; --debug shows where", 1
