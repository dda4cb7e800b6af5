"""AlexNet with five exits on CIFAR-10: trained from scratch, what every exit says, thresholds.

    python -m benchmarks.edgent_alexnet train      writes benchmarks/bases/alexnet5_cifar10.npz
    python -m benchmarks.edgent_alexnet measure    reads it, writes results/edgent_alexnet.json

The last 5 000 training images are never trained on: thresholds are chosen on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.datasets import CACHE, npz_path
from benchmarks.record import ROOT, Row, circumstances, machine_line, report
from exporter.data import DataSet, Split, load_data
from exporter.training import Checkpoint, TrainOptions

if TYPE_CHECKING:
    import keras

NAME = "edgent_alexnet"
BASE = ROOT / "benchmarks" / "bases" / "alexnet5_cifar10"
HELD_OUT = 5_000
DROPOUT = 0.15
WEIGHTS = (1.0, 1.0, 1.0, 1.0, 2.0)
OPTIONS = TrainOptions(epochs=16, rate=1.5e-3, warm_up=0.06, decay=1e-4, crop_pixels=3, flip=True)
NOISE = 0.01
"""Two standard errors of the difference of two accuracies near 0.8 on 10,000 images."""
MAX_DROP = 0.005
"""What thresholds may cost of the last exit's accuracy on held-out images."""


def cifar10() -> DataSet:
    """CIFAR-10 with 5 000 of its training images held out."""
    data = load_data(str(npz_path("cifar10")))
    with np.load(npz_path("cifar10")) as archive:
        x, y = archive["x_train"], archive["y_train"].astype(np.int64)
    return replace(
        data,
        train=Split(x[:-HELD_OUT], y[:-HELD_OUT]),
        held_out=Split(x[-HELD_OUT:], y[-HELD_OUT:]),
    )


def start_tensorflow() -> None:
    """One thread: others work on this machine too, and a run is repeated to the bit."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def trained() -> keras.Model:
    """Branchy AlexNet with its committed weights (float16, read as float32)."""
    from exporter.zoo.alexnet import branchy_alexnet

    model = branchy_alexnet(dropout=DROPOUT)
    with np.load(BASE.with_suffix(".npz")) as archive:
        model.set_weights([archive[f"arr_{i}"].astype("f4") for i in range(len(archive.files))])
    return model


def train() -> None:
    """Train and write the weights and a log; goes on where it was interrupted."""
    import keras

    from exporter.methods.edgent.exits import train_exits
    from exporter.zoo.alexnet import branchy_alexnet

    keras.utils.set_random_seed(0)
    model = branchy_alexnet(dropout=DROPOUT)
    started = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        minutes = (time.monotonic() - started) / 60
        print(f"{what}: {done} of {total}, {minutes:.1f} min", flush=True)

    history = train_exits(
        model,
        cifar10(),
        OPTIONS,
        weights=WEIGHTS,
        checkpoint=Checkpoint(CACHE / NAME),
        progress=tell,
    )
    weights = [np.asarray(w, np.float16) for w in model.get_weights()]
    np.savez_compressed(BASE.with_suffix(".npz"), *weights)
    lines = [json.dumps(asdict(row)) for row in history.epochs]
    BASE.with_suffix(".log").write_text("\n".join(lines) + "\n")


def measure() -> dict[str, Any]:
    """Accuracy of every exit on test images, and what thresholds chosen on held-out ones do."""
    from exporter.graph import layer_graph
    from exporter.methods.edgent.exits import exit_logits
    from exporter.methods.edgent.layers import chains
    from exporter.methods.edgent.thresholds import entropy, knee, sweep, taken

    data, model = cifar10(), trained()
    graph = layer_graph(model)
    held, test = (
        exit_logits(model, data.inputs(part.frames)) for part in (data.held_out, data.test)
    )
    # What a sample costs that leaves at an exit: all layers until there, earlier branches too.
    names: set[str] = set()
    costs = []
    for chain in chains(graph):
        names |= {work.name for work in chain.layers}
        costs.append(sum(layer.macs for layer in graph.layers if layer.name in names))
    found = {}
    for normalized in (False, True):
        point = knee(
            sweep(held, data.held_out.labels, costs, normalized=normalized), max_drop=MAX_DROP
        )
        left = taken(entropy(test, normalized=normalized), point.thresholds)
        right = test.argmax(axis=2)[left, np.arange(len(left))] == data.test.labels
        shares = np.bincount(left, minlength=len(costs)) / len(left)
        found["normalized" if normalized else "nats"] = {
            "thresholds": list(point.thresholds),
            "held_out_accuracy": round(point.accuracy, 4),
            "test_accuracy": round(float(right.mean()), 4),
            "test_shares": [round(float(share), 4) for share in shares],
            "of_last_exits_macs": round(float(shares @ np.array(costs)) / _alone(graph), 4),
        }
    on_held_out = (held.argmax(axis=2) == data.held_out.labels).mean(axis=1)
    accuracies = (test.argmax(axis=2) == data.test.labels).mean(axis=1)
    return {
        "parameters": int(model.count_params()),
        "macs_until_exit": [int(cost) for cost in costs],
        "held_out_accuracy": [round(float(x), 4) for x in on_held_out],
        "test_accuracy": [round(float(x), 4) for x in accuracies],
        "thresholds": found,
        "training": {**asdict(OPTIONS), "dropout": DROPOUT, "weights": list(WEIGHTS)},
        "circumstances": circumstances("tensorflow-cpu", "keras", "numpy"),
    }


def _alone(graph: Any) -> int:
    """Multiply-accumulates of the trunk and its own exit."""
    from exporter.methods.edgent.layers import chains

    last = {work.name for work in chains(graph)[-1].layers}
    return int(sum(layer.macs for layer in graph.layers if layer.name in last))


def rows(result: dict[str, Any]) -> list[Row]:
    """The targets of the table."""
    exits = result["test_accuracy"]
    falls = max(early - late for early, late in itertools.pairwise(exits))
    told = result["thresholds"]["nats"]
    shares = " / ".join(f"{share * 100:.0f}" for share in told["test_shares"])
    return [
        Row(
            "AlexNet with 5 exits on CIFAR-10, last exit",
            ">= 80 %",
            f"{exits[-1] * 100:.2f} %",
            exits[-1] >= 0.8,
        ),
        Row(
            "its exits, test accuracy",
            f"monotone within {NOISE * 100:.0f} point",
            ", ".join(f"{x * 100:.2f}" for x in exits) + " %",
            falls <= NOISE,
        ),
        Row(
            "with entropy thresholds (BranchyNet): accuracy, MACs of the last exit alone",
            "-",
            f"{told['test_accuracy'] * 100:.2f} %, {told['of_last_exits_macs'] * 100:.0f} % "
            f"(leave at exit 1..5: {shares} %)",
            None,
        ),
    ]


def draw(result: dict[str, Any]) -> str:
    """Exits and thresholds of a result, Markdown."""
    lines = [
        "## AlexNet with five exits",
        "",
        f"{result['parameters']:,} parameters, CIFAR-10, {result['training']['epochs']} epochs "
        "from scratch, all exits together; weights in float16. Thresholds are chosen on 5,000 "
        f"held-out images for at most {MAX_DROP * 100:g} points below the last exit.",
        "",
        "| exit | MACs, earlier branches too | test accuracy |",
        "|---|---|---|",
    ]
    for i, (macs, share) in enumerate(
        zip(result["macs_until_exit"], result["test_accuracy"], strict=True), 1
    ):
        lines.append(f"| {i} | {macs / 1e6:.1f} M | {share * 100:.2f} % |")
    lines += [
        "",
        "| entropy | thresholds | leave at exit 1..5 | test accuracy | MACs of the last exit |",
        "|---|---|---|---|---|",
    ]
    for name, told in result["thresholds"].items():
        thresholds = ", ".join(f"{x:g}" for x in told["thresholds"])
        shares = " / ".join(f"{x * 100:.0f} %" for x in told["test_shares"])
        lines.append(
            f"| {name} | {thresholds} | {shares} | {told['test_accuracy'] * 100:.2f} % | "
            f"{told['of_last_exits_macs'] * 100:.0f} % |"
        )
    return "\n".join([*lines, "", f"Measured at: {machine_line(result)}", ""])


def main() -> int:
    """Train, or measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("train", "measure"))
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    start_tensorflow()
    if chosen.what == "train":
        train()
        return 0
    result = measure()
    return report(NAME, result, rows(result), as_json=chosen.json, keep=True)


if __name__ == "__main__":
    sys.exit(main())
