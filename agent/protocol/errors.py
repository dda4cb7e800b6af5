"""Errors that a user can act on, and the exit codes they end a command with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the `shoal` command returns."""

    DONE = 0
    BUG = 1
    INPUT = 2
    DOES_NOT_FIT = 3
    UNREACHABLE = 4
    INTERRUPTED = 130


class ShoalError(Exception):
    """Something the user can mend: what is wrong and where, and what to do next.

    Args:
        message: Rule and observation, one finding a line.
        hint: The next action, shown on a line of its own.
    """

    exit_code = ExitCode.INPUT

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class FleetFileError(ShoalError):
    """The fleet file has mistakes; the message lists all of them as file:line:column."""


class PlatformFileError(ShoalError):
    """A platform file has mistakes; the message lists all of them as file:line:column."""


class DataError(ShoalError):
    """A data set or an input has the wrong shape, type, classes or values."""


class UnsupportedLayer(ShoalError):
    """A layer or operator that a transform or a target cannot handle."""


class VerificationFailed(ShoalError):
    """An exported piece does not compute what its source computes."""


class ManifestError(ShoalError):
    """A manifest is unreadable, of an unknown version, or contradicts itself."""


class BundleMismatch(ShoalError):
    """A bundle's files are not the ones that its manifest names."""


class ScoreError(ShoalError):
    """Scores that are no probabilities: NaN, negative, one class, rows that do not sum to 1."""


class WireError(ShoalError):
    """A payload that is not a whole, unaltered message of this version."""


class PlanDoesNotFit(ShoalError):
    """A piece exceeds its device's budget."""

    exit_code = ExitCode.DOES_NOT_FIT


class DeviceUnreachable(ShoalError):
    """A broker or a device does not answer."""

    exit_code = ExitCode.UNREACHABLE
