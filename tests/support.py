"""What tests of running systems share: waiting for a condition instead of for a time."""

import time
from collections.abc import Callable


def eventually(predicate: Callable[[], object], timeout_s: float = 5.0) -> bool:
    """Whether a condition came true within the time. Use as `assert eventually(lambda: ...)`."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.001
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)
    return True
