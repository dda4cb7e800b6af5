"""A DDNN fleet live on the test views: does it decide, exit and send as the offline table says?

    python -m benchmarks.ddnn_live BUNDLE DATA.npz[#SPLIT] [--lose DEVICE]

Starts every device of the bundle (sensors as its fleet file says, each a recording of all samples)
around a private broker, triggers each test sample, and compares with the bundle's figures. With
--lose the device is killed after half of the samples, while the fleet runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from agent.ask import Asker
from agent.up import FleetProcesses


def test_samples(source: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the test samples in the recording, and their labels; none that nobody sees."""
    name, _, split = source.partition("#")
    with np.load(name) as archive:
        keys = [key for key in archive.files if key.startswith("idx") and key.endswith("_test")]
        chosen = next(key for key in reversed(keys) if split in key)
        seen = archive["X"].any(axis=(2, 3, 4)).any(axis=1)
        index = archive[chosen][seen[archive[chosen]]]
        return index, archive["label"][index]


def measure(bundle: Path, source: str, lose: str | None) -> dict[str, Any]:
    """Trigger every test sample once."""
    index, labels = test_samples(source)
    with ExitStack() as stack:
        fleet = stack.enter_context(FleetProcesses(bundle, private_broker=True))
        fleet.wait_ready(120)
        manifest, target = fleet.target.manifest, fleet.target
        assert manifest is not None
        asker = stack.enter_context(Asker(manifest, target.fleet, target.broker, measure=True))
        classes = manifest.plan.classes
        right, tiers = [], Counter[int]()
        sent, content = Counter[str](), Counter[str]()
        missing = 0
        for done, (sample, label) in enumerate(zip(index, labels, strict=True)):
            if lose is not None and done == len(index) // 2:
                os.kill(fleet.pid(lose), signal.SIGKILL)
            pending = asker.submit(None, sample=int(sample))
            decision = pending.result()
            right.append((decision.label or decision.best_guess) == classes[label])
            tiers[decision.tier] += 1
            missing += bool(decision.missing)
            for row in pending.traffic:
                sent[row.kind] += row.payload_bytes
                content[row.kind] += row.content_bytes
    first = manifest.plan.strategies[0].exits[0].tier
    return {
        "samples": len(index),
        "accuracy": float(np.mean(right)),
        "accuracy_offline": manifest.figures["accuracy_fleet"].value,
        "local_exit_share": tiers[first] / len(index),
        "local_exit_share_offline": manifest.figures["local_exit_share"].value,
        "decisions_with_somebody_missing": missing,
        "payload_bytes_per_sample": {k: round(v / len(index), 2) for k, v in sent.items()},
        "content_bytes_per_sample": {k: round(v / len(index), 2) for k, v in content.items()},
        "lost": lose,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data")
    parser.add_argument("--lose", metavar="DEVICE")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.bundle, arguments.data, arguments.lose), indent=1))


if __name__ == "__main__":
    main()
