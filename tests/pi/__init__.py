"""Real Raspberry Pi userlands, run on any Debian machine: see `userland.py`."""
