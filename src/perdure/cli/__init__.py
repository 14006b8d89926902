"""The command line: one small file a verb. Nothing heavy is imported before a verb starts its work."""

from __future__ import annotations

import os
import sys

from perdure.cli.app import app
from perdure.errors import PerdureError


def main() -> None:
    """Run the command line; failures are one or two plain lines, a traceback only with ``--debug``."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin while data is read
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        app(arguments, standalone_mode=True)
    except PerdureError as error:
        if debug:
            raise
        _complain(error.what, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain("stopped", "")
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(1)
    except MemoryError:
        if debug:
            raise
        _complain("out of memory", "try a smaller training.batch_size or augment.crop")
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        _complain(*_unexpected(error))
        sys.exit(1)


def _unexpected(error: Exception) -> tuple[str, str]:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror, "check the path, its rights and the free disk"
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU is out of memory", "try a smaller training.batch_size or augment.crop, or engine.precision=bf16"
    text = " ".join(str(error).split())[:300]
    return f"unexpected {type(error).__name__}: {text}", "this is a bug; --debug shows where"


def _complain(what: str, hint: str) -> None:
    sys.stderr.write(f"error: {what}\n" + (f"       {hint}\n" if hint else ""))
