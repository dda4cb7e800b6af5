"""What can be set about the method."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerwiseOptions:
    """Options of `--method layerwise`.

    Attributes:
        lip: Whether layers may be divided by input channels too, so that two layers in a row can
            keep their slices; else every device tells all others what it made.
        calibration_samples: Held-out inputs that pieces are quantized with.
    """

    lip: bool = True
    calibration_samples: int = 256
