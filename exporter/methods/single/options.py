"""What can be set about the method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SingleOptions:
    """Options of `--method single`.

    Attributes:
        device: Id of the device that runs the network; None: the one that is estimated to answer
            first, of those that it fits.
        calibration_samples: Held-out inputs that the piece is quantized with.
    """

    device: str | None = None
    calibration_samples: int = 256
