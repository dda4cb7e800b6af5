"""Small DDNNs and real views to feed them: scanned digits cut into tiles, one a device."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from sklearn.datasets import load_digits

from exporter.methods.ddnn.network import DDNN, Architecture


def tiles() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Views (1797, 4, 12, 12, 1) uint8 of quarters of digits, presence (1797, 4), labels (1797,).

    One quarter of each third sample is blank: that device sees nothing.
    """
    digits = load_digits()
    large = np.kron(digits.images * 15, np.ones((3, 3))).astype(np.uint8)[..., None]
    views = np.stack([large[:, r : r + 12, c : c + 12] for r in (0, 12) for c in (0, 12)], axis=1)
    present = np.ones((len(views), 4), bool)
    blank = np.arange(0, len(views), 3)
    present[blank, blank % 4] = False
    views[~present] = 0
    return views, present, digits.target.astype(np.int64)


def network(seed: int = 0, **shape: object) -> DDNN:
    """A DDNN of four devices for `tiles`."""
    import keras

    keras.utils.set_random_seed(seed)
    defaults = {
        "frame": (12, 12, 1),
        "classes": 10,
        "devices": 4,
        "cloud_filters": (8,),
    }
    return DDNN(Architecture(**(defaults | shape)))
