"""What ends a command: bad input (exit code 2) or a broken run (3), printed as `error: ...`."""

import errno
import sys
from collections.abc import Callable

from deepseek_jax.core.target import leave_absent_tpus, order_collectives


class InputError(Exception):
    """What the user gave cannot be used. The message says what, where, and the likely fix."""


class BrokenRun(Exception):
    """What cannot be is: a program or a device is at fault, not the input."""


def printable(text: str) -> str:
    """The text on one line: names may hold anything, and what is no sign is written escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def unanswered(error: OSError) -> bool:
    """Whether a bucket did not answer (core/storage): nobody's fault, and it may later."""
    return str(error.filename).startswith("gs://") and not isinstance(error, FileNotFoundError)


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run `main(argv)`; bad input or a full disk prints one line on stderr and exits with code 2.

    A broken run exits with code 3, a bucket that does not answer with 75 (try again), Ctrl-C with
    130, a vanished reader (`... | head`) with 141.
    """
    leave_absent_tpus()
    order_collectives()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (InputError, BrokenRun, KeyboardInterrupt, OSError) as error:
        if (code := exit_code(error)) is None:
            raise
        raise SystemExit(code) from None


def exit_code(error: BaseException) -> int | None:
    """Say in a line on stderr what the user did; the exit code. None where it was nobody's wish."""
    if isinstance(error, InputError | BrokenRun):
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        return 3 if isinstance(error, BrokenRun) else 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        return 141
    if isinstance(error, OSError) and unanswered(error):
        print(f"error: {error.filename}: {error.strerror}; try again", file=sys.stderr)
        return 75
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"error: {error}; make room, then run the same command again", file=sys.stderr)
        return 2
    return None
