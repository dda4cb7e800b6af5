"""Build a Raspberry Pi userland: `python -m tests.pi --arch arm64`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agent.protocol.errors import ShoalError
from tests.pi.userland import ARCHITECTURES, build, cache_folder


def main() -> int:
    """Parse, build what is not yet built, print where it lies."""
    parser = argparse.ArgumentParser(prog="python -m tests.pi", description=__doc__)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help=f"folder that holds all userlands (default: SHOAL_PI_CACHE or {cache_folder()})",
    )
    arguments = parser.parse_args()
    try:
        userland = build(arguments.arch, arguments.root, say=_say)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(userland.folder)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
