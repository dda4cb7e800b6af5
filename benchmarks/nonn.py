"""NoNN: the authors' own students as an int8 fleet, a teacher's filters, and students of our own.

    python -m benchmarks.nonn published [--images N] [--live N]   # minutes; needs the shared data
    python -m benchmarks.nonn heads [--taught N]                  # minutes; needs the shared data
    python -m benchmarks.nonn filters                             # minutes; needs the shared data
    python -m benchmarks.nonn recipe digits [--seeds N]           # minutes
    python -m benchmarks.nonn recipe resnet56_cifar10_brief --seeds 1  # 2 hours: 12 epochs
    python -m benchmarks.nonn recipe resnet56_cifar10 [--seeds N] # days on a CPU: take a GPU
    python -m benchmarks.nonn recipe wrn40_4_cifar10 [--seeds N]  # the paper's; a GPU

`published` loads the two trained students that the authors published, exports them to int8 as
`shoal export` does, and compares float with int8 on the CIFAR-10 test images, with everybody there
and with each student lost. `--live` of them are also asked of a fleet of processes around a broker.
`heads` trains nothing but the authors' merging layer anew, on what the int8 students say of
training images, one of them unheard now and then: what does tolerating a loss take?
`filters` parts the knowledge of the trained ResNet-56. `recipe` teaches two students, without and
with student dropout and with the paper's loss, and one student of the same size alone with
distillation; the last 5 000 training images of CIFAR-10 are never trained on, and nothing is chosen
on test data. What takes long is kept in .cache/nonn, so that a second run is quick and an
interrupted one goes on. Results: results/nonn.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.datasets import ROOT, SHARED, npz_path
from benchmarks.record import BRIEF, RESULTS, circumstances, machine_line

os.environ.setdefault("OMP_NUM_THREADS", "1")

NAME = "nonn"
CACHE = ROOT / ".cache" / "nonn"
STUDENTS = SHARED / "nonn" / "nonn_2s_students_oihw.npz"
FLEET = """shoal: 1
fleet: published
aggregator: hub
deadline: 5 s
devices:
  - {id: pi-left, kind: pi-4}
  - {id: pi-right, kind: pi-4}
  - {id: hub, kind: pi-4, tier: edge}
"""
MAP_BYTES = {"left": 34 * 64, "right": 46 * 64}
"""What the authors' students send, as int8: maps of 8x8."""


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of an earlier run, or a new one."""
    path = CACHE / f"{name}.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, make())
        part.replace(path)
    found: np.ndarray = np.load(path)
    return found


def authors_network(images: int) -> tuple[Any, Any]:
    """The authors' students as branches, and CIFAR-10 as they read it with so many test images."""
    from agent.protocol.plan import Fusion
    from exporter.data import load_data
    from exporter.methods.branches import Branch, BranchNetwork
    from exporter.zoo.nonn_students import DEVIATION, MEAN, published_students

    data = load_data(str(npz_path("cifar10")))
    scale = tuple(1 / 255 / d for d in DEVIATION)
    offset = tuple(-m / d for m, d in zip(MEAN, DEVIATION, strict=True))
    data = data.preprocessed(scale, offset)
    data = replace(data, test=data.test.take(np.arange(min(images, len(data.test)))))
    authors = published_students(STUDENTS)
    branches = tuple(
        Branch(f"student-{side}", f"pi-{side}", model, f"{model.output_shape[-1]} filters")
        for side, model in zip(("left", "right"), authors.students, strict=True)
    )
    return BranchNetwork(branches, authors.head, Fusion.CONCAT), data


def fleet_of(text: str) -> Any:
    """A fleet of its file's text."""
    from agent.protocol.fleet import load_fleet

    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "fleet.yaml"
        path.write_text(text)
        return load_fleet(path)


UNHEARD = (0.1, 0.3, 0.5)
"""Chances that a student is not heard while the merging layer is trained."""


def heads(images: int, taught: int) -> dict[str, Any]:
    """The authors' int8 students with their merging layer, and with others trained for losses."""
    import keras

    from exporter import pipeline
    from exporter.data import Split
    from exporter.methods.branches import merged
    from exporter.methods.branches.network import HEAD
    from exporter.training import TrainOptions, cross_entropy, train

    network, data = authors_network(images)
    fleet = fleet_of(FLEET)
    *students, last = network.pieces(data, fleet)
    run = pipeline.runner(pipeline.quantize(students, data, fleet, "int8", quiet))
    training = data.train.take(np.arange(taught))

    def said(frames: np.ndarray, name: str) -> list[np.ndarray]:
        inputs = data.inputs(frames)
        return [
            cached(f"int8_{piece.name}_{name}{len(frames)}", partial(run, piece.name, inputs))
            for piece in students
        ]

    features, known = said(data.test.frames, ""), said(training.frames, "train_")
    samples = Split(np.concatenate(known, axis=1), training.labels)
    widths = [part.shape[1] for part in known]
    first = network.head.get_weights()
    rows = {}
    for chance in (None, *UNHEARD):
        network.head.set_weights(first)
        if chance is not None:

            def loss(x: Any, labels: Any, heard: Any, taught: Any) -> Any:
                whose = keras.ops.concatenate(
                    [keras.ops.repeat(heard[:, i : i + 1], w, 1) for i, w in enumerate(widths)], 1
                )
                return cross_entropy(network.head(x * whose, training=True), labels)

            train(
                [network.head],
                loss,
                samples,
                np.asarray,
                TrainOptions(epochs=40, rate=2e-3, part_dropout=chance),
                parts=len(widths),
                progress=quiet,
            )
        piece = replace(last, model=network.head)
        finish = pipeline.runner(pipeline.quantize([piece], data, fleet, "int8", quiet))

        def accuracy(heard: Sequence[bool], finish: Any = finish) -> float:
            logits = finish(HEAD, merged(network.merge, features, heard))
            return float(np.mean(logits.argmax(1) == data.test.labels))

        rows["authors" if chance is None else str(chance)] = {
            "together": accuracy((True, True)),
            "right_lost": accuracy((True, False)),
            "left_lost": accuracy((False, True)),
        }
    return {"images": len(data.test.labels), "taught": taught, "rows": rows}


def published(images: int, live: int) -> dict[str, Any]:
    """Float and int8 accuracy of the authors' students."""
    from agent.protocol.plan import Fusion
    from exporter import pipeline
    from exporter.bundle import write_bundle
    from exporter.methods.branches import merged, settle
    from exporter.methods.branches.network import HEAD

    network, data = authors_network(images)
    labels = data.test.labels
    count = len(labels)

    def table(features: list[np.ndarray], finish: Callable[[np.ndarray], np.ndarray]) -> Any:
        def accuracy(heard: tuple[bool, bool]) -> float:
            logits = finish(merged(Fusion.CONCAT, features, heard))
            return float(np.mean(logits.argmax(1) == labels))

        return {
            "together": accuracy((True, True)),
            "right_lost": accuracy((True, False)),
            "left_lost": accuracy((False, True)),
        }

    def float_features(side: int) -> np.ndarray:
        inputs = data.inputs(data.test.frames)
        return np.concatenate(
            [
                np.asarray(network.branches[side].model(inputs[i : i + 100], training=False))
                for i in range(0, count, 100)
            ]
        )

    in_float = [cached(f"float_{side}_{count}", partial(float_features, side)) for side in range(2)]
    with tempfile.TemporaryDirectory() as home:
        fleet = fleet_of(FLEET)
        exported = pipeline.quantize(
            network.pieces(data, fleet), data, fleet, "int8", quiet, allow_drift=True
        )
        run = pipeline.runner(exported)
        inputs = data.inputs(data.test.frames)

        def kept(piece: str, x: np.ndarray, output: str | None = None) -> np.ndarray:
            if piece == HEAD or x is not inputs:
                return run(piece, x, output)
            return cached(f"int8_{piece}_{count}", lambda: run(piece, x, output))

        in_int8 = [kept(branch.name, inputs) for branch in network.branches]
        result: dict[str, Any] = {
            "images": count,
            "float": table(in_float, lambda x: np.asarray(network.head(x))),
            "int8": table(in_int8, lambda x: run(HEAD, x)),
            "tflite_bytes": {piece.name: len(piece.tflite) for piece in exported},
            "payload_bytes": {p.name: p.message_bytes for p in exported if p.name != HEAD},
            "map_bytes": MAP_BYTES,
            "drift": {
                piece.name: [
                    {"runtime": a.runtime, "max_lsb": a.max_lsb, "accepted_by": a.accepted_by}
                    for a in piece.verification.agreements
                ]
                for piece in exported
            },
        }
        if live:
            few = replace(data, test=data.test.take(np.arange(live)))
            settled = settle(network, "nonn", few, fleet, run)
            bundle = Path(home) / "bundle"
            bundle.mkdir()
            write_bundle(
                bundle,
                fleet=fleet,
                fleet_text=FLEET,
                plan=settled.plan,
                frame=data.frame,
                pieces=exported,
                figures=settled.figures,
                report=settled.report,
            )
            whole = merged(Fusion.CONCAT, [x[:live] for x in in_int8])
            alone = merged(Fusion.CONCAT, [x[:live] for x in in_int8], (True, False))
            result["live"] = asked(
                bundle, few.test.frames, run(HEAD, whole).argmax(1), run(HEAD, alone).argmax(1)
            )
    return result


def asked(bundle: Path, frames: np.ndarray, whole: np.ndarray, alone: np.ndarray) -> dict[str, Any]:
    """Ask a live fleet about frames: all of them, and again after the right student was killed."""
    from agent.ask import Asker
    from agent.up import FleetProcesses

    with FleetProcesses(bundle, private_broker=True) as fleet:
        fleet.wait_ready(120)
        manifest = fleet.target.manifest
        assert manifest is not None
        with Asker(manifest, fleet.target.fleet, fleet.target.broker) as asker:

            def same(expected: np.ndarray) -> int:
                decisions = [asker.submit(frame).result() for frame in frames]
                labels = [manifest.plan.classes[i] for i in expected]
                return sum(d.label == x for d, x in zip(decisions, labels, strict=True))

            together = same(whole)
            fleet.stop_device("pi-right")
            return {"asked": len(frames), "as_offline": together, "lost_as_offline": same(alone)}


def filters() -> dict[str, Any]:
    """How the last convolution of the trained ResNet-56 falls into communities and parts."""
    from exporter.methods.nonn.communities import filter_network
    from exporter.methods.nonn.partition import partition
    from exporter.methods.nonn.teacher import teacher_of

    base, data = resnet56()
    teacher = teacher_of(base)
    frames = data.held_out.frames
    activations = cached(
        f"resnet56_{len(frames)}", lambda: teacher.activations(data.inputs(frames))
    )
    found = filter_network(activations)
    halves = [filter_network(activations[i::2]) for i in (0, 1)]
    return {
        "teacher": "ResNet-56, CIFAR-10",
        "layer": teacher.layer,
        "images": len(frames),
        "filters": teacher.filters,
        "links": int((found.weights > 0).sum() // 2),
        "communities": [len(members) for members in found.communities],
        "isolated": len(found.isolated),
        "parts": {
            str(k): [len(part) for part in partition(found, [1.0] * k)] for k in (2, 3, 4, 8)
        },
        "unequal_parts_3_2_1": [len(part) for part in partition(found, [3.0, 2.0, 1.0])],
        "same_communities_of_half_the_images": agreement(*halves),
    }


def agreement(one: Any, other: Any) -> float:
    """Share of the pairs of filters that share a community in both networks, of those in either."""

    def pairs(network: Any) -> set[tuple[int, int]]:
        return {(i, j) for group in network.communities for i in group for j in group if i < j}

    first, second = pairs(one), pairs(other)
    return len(first & second) / max(len(first | second), 1)


def digits() -> tuple[Any, Any]:
    """A network of two convolutions, trained on scikit-learn's digits."""
    import keras

    from benchmarks.digits_model import train_digits
    from exporter.data import load_data

    path, data = CACHE / "digits.keras", load_data("digits")
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        train_digits(data, path)
    return keras.models.load_model(path, compile=False), data


def cifar10(mean: Sequence[float], deviation: Sequence[float]) -> Any:
    """CIFAR-10 for a normalisation; the last 5 000 training images are held out."""
    from exporter.data import Split, load_data

    data = load_data(str(npz_path("cifar10")))
    with np.load(npz_path("cifar10")) as archive:
        x, y = archive["x_train"], archive["y_train"].astype(np.int64)
    data = replace(
        data, train=Split(x[:-5_000], y[:-5_000]), held_out=Split(x[-5_000:], y[-5_000:])
    )
    scale = tuple(1 / 255 / d for d in deviation)
    return data.preprocessed(scale, tuple(-m / d for m, d in zip(mean, deviation, strict=True)))


def resnet56() -> tuple[Any, Any]:
    """The trained ResNet-56 that others published, 93.39 %."""
    from exporter.zoo.resnet import DEVIATION, MEAN, cifar_resnet, load_pytorch_resnet

    model = cifar_resnet(56)
    load_pytorch_resnet(model, SHARED / "cifar10_resnet" / "resnet56.npz")
    return model, cifar10(MEAN, DEVIATION)


def wrn40_4() -> tuple[Any, Any]:
    """The paper's teacher, trained as there: 200 epochs, SGD, steps."""
    import keras

    from exporter.training import Checkpoint, TrainOptions, cross_entropy, train
    from exporter.zoo.nonn_students import DEVIATION, MEAN
    from exporter.zoo.wrn import group_widths, wide_resnet

    data = cifar10(MEAN, DEVIATION)
    keras.utils.set_random_seed(0)
    model = wide_resnet(40, group_widths(4))

    def loss(x: Any, labels: Any, heard: Any, taught: Any) -> Any:
        return cross_entropy(model(x, training=True), labels)

    train(
        [model],
        loss,
        data.train,
        data.inputs,
        TrainOptions(200, optimizer="sgd", rate=0.1, decay=5e-4, crop_pixels=4, flip=True),
        checkpoint=Checkpoint(CACHE, "wrn40-4"),
        progress=quiet,
    )
    return model, data


@dataclass(frozen=True)
class Recipe:
    """What is taught, to whom, how.

    Attributes:
        teacher: Makes the trained teacher and its data.
        ratio: Parameters of the teacher for one of each student's, at least.
        depth: Of the students, WRNs.
        training: Options of `TrainOptions`.
        variants: Of VARIANTS, those that are taught; None: all.
    """

    teacher: Callable[[], tuple[Any, Any]]
    ratio: float
    depth: int
    training: Mapping[str, Any]
    variants: tuple[str, ...] | None = None


AT_LENGTH = {
    "epochs": 200, "optimizer": "sgd", "rate": 0.1, "decay": 5e-4, "crop_pixels": 4, "flip": True
}  # fmt: skip
TOLERANT, ALONE = "two students, student dropout 0.4", "one student alone, distilled"
RECIPES = {
    "digits": Recipe(digits, 20, 10, {"epochs": 40, "batch": 64, "rate": 5e-3}),
    "resnet56_cifar10_brief": Recipe(
        resnet56, 5, 16, {**AT_LENGTH, "epochs": 12, "warm_up": 0.1}, (TOLERANT, ALONE)
    ),
    "resnet56_cifar10": Recipe(resnet56, 10, 16, AT_LENGTH),
    "wrn40_4_cifar10": Recipe(wrn40_4, 50, 16, AT_LENGTH),
}
VARIANTS = {
    "two students": (2, 100.0, 0.0, 1),
    "two students, student dropout 0.2": (2, 100.0, 0.2, 1),
    TOLERANT: (2, 100.0, 0.4, 1),
    "two students, larger (ratio 10 for 20), student dropout 0.4": (2, 100.0, 0.4, 2),
    "two students, the paper's loss": (2, 1e4, 0.0, 1),
    ALONE: (1, 0.0, 0.0, 1),
}
"""Students, weight of the activations, chance that a student is not heard, and
what the recipe's ratio is divided by: how many times the parameters a student may have."""


def recipe(name: str, variant: str, seed: int) -> dict[str, Any]:
    """Teach students and measure them on test data, float and int8."""
    from exporter import pipeline
    from exporter.graph import layer_graph
    from exporter.methods.branches import merged
    from exporter.methods.branches.network import HEAD
    from exporter.methods.nonn.communities import CommunityOptions
    from exporter.methods.nonn.loss import LossOptions
    from exporter.methods.nonn.method import classroom, teach
    from exporter.methods.nonn.options import NonnOptions
    from exporter.training import TrainOptions

    chosen = RECIPES[name]
    students, beta, dropout, size = VARIANTS[variant]
    base, data = chosen.teacher()
    options = NonnOptions(
        communities=CommunityOptions(seed=seed),
        loss=LossOptions(beta=beta),
        training=TrainOptions(**chosen.training, part_dropout=dropout, seed=seed),
        depth=chosen.depth,
        ratio=chosen.ratio / size,
        cache=CACHE,
        seed=seed,
    )
    workers = "".join(f"  - {{id: pi-{i}, kind: pi-4}}\n" for i in range(students))
    fleet = fleet_of(
        f"shoal: 1\nfleet: class\naggregator: hub\ndevices:\n{workers}"
        "  - {id: hub, kind: pi-4, tier: edge}\n"
    )
    room = classroom(base, data, fleet, options)
    history = teach(room, data, options, quiet)
    x, labels = data.inputs(data.test.frames), data.test.labels
    exported = pipeline.quantize(
        room.network.pieces(data, fleet), data, fleet, "int8", quiet, allow_drift=True
    )
    run = pipeline.runner(exported)
    in_float = room.network.features(x)
    in_int8 = [run(branch.name, x) for branch in room.network.branches]
    heard = [[i != lost for i in range(students)] for lost in range(-1, students)]

    def right(logits: np.ndarray) -> float:
        return float(np.mean(logits.argmax(1) == labels))

    whole, *one_lost = (
        right(run(HEAD, merged(room.network.merge, in_int8, who))) for who in heard if any(who)
    )
    return {
        "accuracy": right(room.network.finish(in_float)),
        "accuracy_int8": whole,
        "one_lost_int8": one_lost,
        "accuracy_held_out": history.accuracy,
        "accuracy_teacher": right(base.predict(x, batch_size=250, verbose=0)),
        "parameters_teacher": layer_graph(base).inference_parameters,
        "parameters": [
            layer_graph(branch.model).inference_parameters for branch in room.network.branches
        ],
        "filters": [len(part) for part in room.parts],
        "epochs": len(history.epochs),
    }


def keep(part: str, result: dict[str, Any]) -> None:
    """Put one part into results/nonn.json, beside the others."""
    stored = read()
    stored[part] = {
        **result,
        "circumstances": circumstances("tensorflow-cpu", "keras", "ai-edge-litert"),
    }
    (RESULTS / f"{NAME}.json").write_text(json.dumps(stored, indent=1) + "\n")


# Tables.


def draw() -> str:
    """The tables of what was kept."""
    stored = read()
    lines = ["# NoNN: students that share a teacher's knowledge", ""]
    if "published" in stored:
        lines += _published_table(stored["published"])
    if "heads" in stored:
        lines += _heads_table(stored["heads"])
    for name, chosen in RECIPES.items():
        if runs := stored.get(f"recipe {name}", {}).get("runs"):
            lines += _recipe_table(name, chosen, runs)
    missing = [name for name in RECIPES if f"recipe {name}" not in stored]
    if missing:
        lines += [
            f"Not measured yet, for want of a GPU: {', '.join(missing)}, of 200 epochs "
            "(`python -m benchmarks.nonn recipe NAME`). The paper's WRN40-4 with two students of a "
            "fiftieth loses 0.86 points to its teacher.",
            "",
        ]
    lines += [BRIEF, ""]
    if "filters" in stored:
        lines += _filters_text(stored["filters"])
    lines += ["Measured at:", *(f"- `{k}`: {machine_line(v)}" for k, v in stored.items()), ""]
    return "\n".join(lines)


def _percent(*values: float) -> str:
    """Mean +- deviation in percent, and how many."""
    mean = f"{100 * np.mean(values):.2f}"
    return f"{mean} +- {100 * np.std(values, ddof=1):.2f} ({len(values)})" if values[1:] else mean


def _published_table(result: dict[str, Any]) -> list[str]:
    in_float, in_int8 = result["float"], result["int8"]
    rows = [
        ("both students", "94.32", "together"),
        ("the one with 46 filters lost", "92.1", "right_lost"),
        ("the one with 34 filters lost", "83.6", "left_lost"),
    ]
    sent, maps = sum(result["payload_bytes"].values()), sum(result["map_bytes"].values())
    live = result["live"]
    lost = 100 * (in_float["together"] - in_int8["together"])
    return [
        "The authors' own two trained students (428,595 and 429,639 parameters), imported and "
        f"exported to int8; accuracy in % on {result['images']:,} CIFAR-10 test images:",
        "",
        "| who is there | known of them | float | int8 fleet |",
        "|---|---|---|---|",
        *(
            f"| {what} | {known} | {_percent(in_float[key])} | {_percent(in_int8[key])} |"
            for what, known, key in rows
        ),
        "",
        f"Int8 costs {lost:.2f} points (goal 0.3). Batch norm, ReLU and pooling of the features "
        "are done by the students instead of the host, the same to rounding: an inference "
        f"sends {sent} B of payload in all, where maps of 8x8 would be {maps:,} B of content. "
        f"Live, three processes around a broker: {live['as_offline']} of {live['asked']} "
        "decisions as offline, and with a student stopped "
        f"{live['lost_as_offline']} of {live['asked']}.",
        "",
    ]


def _heads_table(result: dict[str, Any]) -> list[str]:
    lines = [
        "The same int8 students; of the fleet nothing but the merging layer is trained anew, on "
        f"what they say of {result['taught']:,} training images, each unheard with a chance. "
        f"Accuracy in % on {result['images']:,} test images:",
        "",
        "| merging layer | both | the one with 46 filters lost | the one with 34 filters lost "
        "| points that the worse loss costs |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        what = "the authors'" if name == "authors" else f"unheard {float(name) * 100:.0f} %"
        cells = [row[key] for key in ("together", "right_lost", "left_lost")]
        lines.append(
            f"| {what} | {' | '.join(map(_percent, cells))} "
            f"| {100 * (cells[0] - min(cells[1:])):.2f} |"
        )
    return [*lines, ""]


def _filters_text(result: dict[str, Any]) -> list[str]:
    sizes = ", ".join(map(str, result["communities"]))
    parts = "; ".join(
        f"{k} students: {', '.join(map(str, part))}" for k, part in result["parts"].items()
    )
    unequal = ", ".join(map(str, result["unequal_parts_3_2_1"]))
    again = 100 * result["same_communities_of_half_the_images"]
    return [
        f"Filters of the trained {result['teacher']} (`{result['layer']}`, {result['filters']} "
        f"filters, {result['images']:,} training images, {result['links']} links): communities of "
        f"{sizes}; {result['isolated']} filters belong to none. Parts: {parts}; three students "
        f"that can do 3, 2 and 1: {unequal}. Of the pairs that share a community in either half "
        f"of the images, {again:.0f} % do in both.",
        "",
    ]


def _recipe_table(name: str, chosen: Recipe, runs: dict[str, Any]) -> list[str]:
    one = next(iter(runs.values()))
    size = f"{one['parameters_teacher'] / max(one['parameters']):.0f}"
    lines = [
        f"`{name}`: teacher {_percent(one['accuracy_teacher'])} %, "
        f"{one['parameters_teacher']:,} parameters, {size} times a student's "
        f"({', '.join(f'{x:,}' for x in one['parameters'])}). One student lost may cost 3 points. "
        "Test data, mean +- deviation over "
        "seeds (their number in brackets), %:",
        "",
        "| students | parameters | float | int8 | worst one lost, int8 | that costs "
        "| points below the teacher, int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        found = [run for key, run in runs.items() if key.rpartition(" #")[0] == variant]
        if not found:
            continue
        lost = [min(run["one_lost_int8"]) for run in found if run["one_lost_int8"]]
        costs = 100 * (np.mean([run["accuracy_int8"] for run in found]) - np.mean(lost or [0]))
        below = np.mean([run["accuracy_teacher"] - run["accuracy_int8"] for run in found])
        lines.append(
            f"| {variant} | {sum(found[0]['parameters']):,} "
            f"| {_percent(*(run['accuracy'] for run in found))} "
            f"| {_percent(*(run['accuracy_int8'] for run in found))} "
            f"| {_percent(*lost) if lost else '-'} | {f'{costs:.2f}' if lost else '-'} "
            f"| {100 * below:.2f} |"
        )
    ours, alone = (
        np.mean([run["accuracy_int8"] for key, run in runs.items() if key.rpartition(" #")[0] == v])
        for v in (TOLERANT, ALONE)
    )
    return [
        *lines,
        "",
        f"Two students that can do without each other are {100 * (ours - alone):.2f} points ahead "
        "of one alone (goal 1), int8.",
        "",
    ]


def main() -> None:
    """Measure what was asked for, print and keep it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=["published", "heads", "filters", "recipe"])
    parser.add_argument("recipe", nargs="?", choices=list(RECIPES), default="digits")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--live", type=int, default=200)
    parser.add_argument("--taught", type=int, default=5_000, metavar="IMAGES")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    started = time.monotonic()
    if arguments.part == "recipe":
        name = f"recipe {arguments.recipe}"
        runs = read().get(name, {}).get("runs", {})
        for seed in range(arguments.seeds):
            for variant in RECIPES[arguments.recipe].variants or VARIANTS:
                if (key := f"{variant} #{seed}") in runs:
                    continue
                runs[key] = recipe(arguments.recipe, variant, seed)
                print(key, json.dumps(runs[key]), flush=True)
                keep(name, {"runs": runs})
        return
    if arguments.part == "filters":
        result = filters()
    elif arguments.part == "heads":
        result = heads(arguments.images, arguments.taught)
    else:
        result = published(arguments.images, arguments.live)
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps(result, indent=1))
    if arguments.images == 10_000:
        keep(arguments.part, result)


def read() -> dict[str, Any]:
    """What was kept."""
    path = RESULTS / f"{NAME}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return stored


if __name__ == "__main__":
    main()
