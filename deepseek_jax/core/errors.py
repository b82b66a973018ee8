"""Bad input: one exception, and the one place that turns it into `error: ...` and exit code 2."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """What the user gave cannot be used. The message says what, where, and the likely fix."""


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a command's `main(argv)`; bad input prints one line on stderr and exits with code 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader of our output went away (`... | head`): not our error
        sys.stderr.close()
        raise SystemExit(141) from None
