"""Catch what native libraries write to descriptor 2, where `redirect_stderr` does not reach."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LOCK = threading.RLock()


@dataclass
class NativeStderr:
    """What was written to file descriptor 2; complete once the `with` block has ended."""

    text: str = ""


@contextmanager
def captured_native_stderr() -> Iterator[NativeStderr]:
    """Keep a native library's chatter off the user's terminal, and hand it over for reading.

    Descriptor 2 belongs to the whole process: while the block runs, other threads' errors land in
    the capture too, and a second capture on another thread waits. Keep the block short. It works
    where stderr is closed and where a test runner has already redirected it, and may be nested.
    """
    captured = NativeStderr()
    with _LOCK, tempfile.TemporaryFile() as sink:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            saved: int | None = os.dup(2)
        except OSError:
            saved = None
        os.dup2(sink.fileno(), 2)
        try:
            yield captured
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            if saved is None:
                os.close(2)
            else:
                os.dup2(saved, 2)
                os.close(saved)
            sink.seek(0)
            captured.text = sink.read().decode("utf-8", "replace")


def start_tensorflow() -> None:
    """Load TensorFlow and run a first operation, without what it says of itself on the way.

    Call it before anything else imports TensorFlow or Keras; later calls cost nothing.
    """
    if "tensorflow" in sys.modules:
        return
    with captured_native_stderr():
        import tensorflow as tf

        tf.add(tf.zeros(1), 1.0)
    tf.get_logger().setLevel("ERROR")  # many small models retrace by design
