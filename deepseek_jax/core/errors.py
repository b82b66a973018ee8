"""Bad input: one exception, and the one place that turns it into `error: ...` and exit code 2."""

import errno
import sys
from collections.abc import Callable

from deepseek_jax.core.target import leave_absent_tpus


class InputError(Exception):
    """What the user gave cannot be used. The message says what, where, and the likely fix."""


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run `main(argv)`; bad input or a full disk prints one line on stderr and exits with code 2.

    Ctrl-C exits with code 130, a reader that went away (`... | head`) with 141.
    """
    leave_absent_tpus()
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}; make room, then run the same command again", file=sys.stderr)
        raise SystemExit(2) from None
