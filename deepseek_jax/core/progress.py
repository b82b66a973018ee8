"""How far a long pass over bytes is: one line on stderr from time to time."""

import datetime
import sys
import time
from collections.abc import Callable


def byte_progress(what: str, every: float) -> Callable[[int, int], None]:
    """Shows the bytes done (first argument), of how many (0: unknown), the rate and the time left.

    At most a line in `every` seconds. What the first call says was done before is not in the rate.
    """
    start: tuple[int, float] | None = None
    shown = 0.0

    def show(done: int, total: int) -> None:
        nonlocal start, shown
        now = time.monotonic()
        if start is None:
            start, shown = (done, now), now
        if now - shown < every or done <= start[0]:
            return
        shown, rate = now, (done - start[0]) / (now - start[1])
        line = f"{what}: {done / 1e6:,.1f}"
        if total:
            left = datetime.timedelta(seconds=round(max(total - done, 0) / rate))
            line += f" of {total / 1e6:,.1f} MB ({min(done / total, 1):.0%}), ETA {left}"
        else:
            line += " MB"
        print(f"{line}, {rate / 1e6:,.1f} MB/s", file=sys.stderr, flush=True)

    return show
