"""Microcontroller side of Shoal: build, size, flash and emulate firmware."""
