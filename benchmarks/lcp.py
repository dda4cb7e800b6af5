"""LCP: counts of the paper's tables, and what trained branches reach.

    python -m benchmarks.lcp counts                       # no TensorFlow, at once
    python -m benchmarks.lcp digits [--seeds N]           # minutes: a user's network is split
    python -m benchmarks.lcp train CASE ... [--seeds N]   # hours: the paper's networks
    python -m benchmarks.lcp fixed CASE ...               # of what is trained, 3.13 alone again

CASE is a key of CASES, such as `lenet/4`. Every run is kept in .cache/lcp and goes on where it was
interrupted; its result is added to results/lcp.json. The last 5 000 training images tell which
accuracy validation has; nothing is chosen by test images. Pieces are exported as `shoal export`
does, and run with LiteRT on all test images, with everybody there and with each branch lost; 3.13
fixed point is emulated. `counts` also counts what is sent, against every layer divided (Fig. 11).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.datasets import ROOT, npz_path
from benchmarks.record import RESULTS, circumstances, load, save
from exporter.methods.lcp.communication import lcp_traffic, model_parallel_traffic
from exporter.methods.lcp.counts import split_counts
from exporter.training import Checkpoint, TrainOptions, augmented, train
from exporter.zoo.papers import CIFARNET_BN, NETWORKS, PaperNetwork

NAME = "lcp"
CACHE = ROOT / ".cache" / "lcp"
HELD_OUT = 5_000


@dataclass(frozen=True)
class Count:
    """A line of the table of counts.

    Attributes:
        model, split, fatten, classes: As `shoal counts lcp` takes them; `fatten` in percent.
        params: What the paper prints, or its layout gives exactly; None where it prints another or
            none.
        note: The difference and its reason where there is one.
    """

    model: str
    split: int
    fatten: int
    classes: int
    params: int | None
    note: str = ""


_SCALE = "MACs in the paper also count biases, pooling and norms (0.6 % more)"
_ALEX = "MACs in the paper fit maps of 55, 26 and 11 pixels; the layout gives 54, 26 and 12"
COUNTS = (
    Count("lenet-fc", 1, 0, 10, 266_610),
    *(
        Count("lenet", s, 0, 10, n, "the paper's MACs are the number of weights")
        for s, n in ((1, 61_706), (2, 31_466), (4, 16_094), (8, 8_834))
    ),
    Count("cifarnet", 1, 0, 10, 797_966, _SCALE),
    *(
        Count("cifarnet", s, 0, 100, n, _SCALE)
        for s, n in ((1, 815_336), (2, 410_476), (4, 208_052), (8, 106_852))
    ),
    Count(
        "cifarnet",
        8,
        40,
        10,
        None,
        "not printed; 4.0 times fewer parameters, but 1.9 times fewer MACs: the first layer reads "
        "three channels in every branch and is two thirds of them; Shoal does not fatten it",
    ),
    Count("alexnetv2", 1, 0, 1000, 50_303_912, _ALEX),
    Count("alexnetv2", 8, 0, 1000, 6_317_480, _ALEX),
    Count("alexnetv2", 8, 40, 1000, 12_108_024, _ALEX),
    Count("vgg16", 1, 0, 1000, 138_357_544),
    Count("vgg16", 8, 0, 1000, None, "7.64 M in the paper: the figure of VGG-S split8, copied"),
    Count("vgg16", 8, 40, 1000, 33_777_712),
    Count("vgg-s", 1, 0, 100, 76_152_548),
    Count("vgg-s", 1, 0, 102, None, "60.79 M in the paper: no standard stack has as many"),
    Count("resnet18", 1, 0, 1000, 11_689_512, "MACs 0.01 G below the paper's, all four"),
    *(
        Count("resnet18", s, 0, 1000, n, "MACs 0.01 G below the paper's, all four")
        for s, n in ((2, 6_110_760), (4, 3_321_384), (8, 1_926_696))
    ),
    Count("resnet50", 1, 0, 1000, None, "22.80 M in the paper: without projection shortcuts"),
    Count("resnet50", 8, 0, 1000, None, "5.42 M in the paper: 5.042 with a digit dropped"),
    Count("resnet50", 8, 40, 1000, 8_604_056, "MACs 1.18 G in the paper"),
    Count("mobilenet", 1, 0, 1000, None, "4.24 M in the paper; 4.86 G MACs are not MobileNet's"),
    Count("mobilenet", 8, 0, 1000, None, "1.12 M in the paper: between sum (0.59) and concat"),
    Count("mobilenet", 8, 40, 1000, None, "2.12 M in the paper: between sum (1.03) and concat"),
)


@dataclass(frozen=True)
class Case:
    """A network to train.

    Attributes:
        network: Its layout, or its widening factor: a wide ResNet of 10 layers, cut by the splitter
            as a user's network is.
        data: Name of the data.
        split: Branches.
        fatten: Percent.
        dropout: Chance that a branch is not heard in training.
        teach: Share of the loss that is the scores of the whole network, trained before; branches
            begin with the weights of their channels.
        prune: Percent of the channels that the trained branches of the same case without it lose;
            they are then trained as long again.
        epochs: Passes over the images; None: as the recipe of its data says.
        views: Shifted and mirrored copies of every image that are made once, for a teacher that is
            slow: it is asked once about each. 0: new ones in every epoch.
        paper: Its accuracy in the paper, percent.
    """

    network: PaperNetwork | int
    data: str
    split: int
    fatten: int = 0
    dropout: float = 0.0
    teach: float = 0.0
    prune: int = 0
    epochs: int | None = None
    views: int = 0
    paper: str = "-"

    @property
    def recipe(self) -> TrainOptions:
        """How it is trained."""
        usual = RECIPES[self.data]
        return replace(usual, epochs=self.epochs or usual.epochs, part_dropout=self.dropout)

    @property
    def text(self) -> str:
        """Name of the network, for tables."""
        if isinstance(self.network, int):
            return f"WRN-10-{self.network}"
        return self.network.name.removesuffix("-bn")


LENET, CIFARNET = NETWORKS["lenet"], CIFARNET_BN
CASES = {
    "lenet/1": Case(LENET, "mnist", 1, paper="98.76"),
    "lenet/2": Case(LENET, "mnist", 2, paper="98.86"),
    "lenet/4": Case(LENET, "mnist", 4, paper="98.93"),
    "lenet/8": Case(LENET, "mnist", 8, paper="98.81"),
    "lenet/8-p40": Case(LENET, "mnist", 8, prune=40, paper="split8 - 0.1"),
    "lenet/8-tolerant": Case(LENET, "mnist", 8, dropout=0.3),
    "cifarnet/1": Case(CIFARNET, "cifar10", 1),
    "cifarnet/2": Case(CIFARNET, "cifar10", 2),
    "cifarnet/4": Case(CIFARNET, "cifar10", 4),
    "cifarnet/8": Case(CIFARNET, "cifar10", 8),
    "cifarnet/8-f40": Case(CIFARNET, "cifar10", 8, 40, teach=0.5, paper="base - 3"),
    "cifarnet/8-f40-p40": Case(
        CIFARNET, "cifar10", 8, 40, teach=0.5, prune=40, paper="unpruned - 0.1"
    ),
    "cifarnet/8-f40-tolerant": Case(CIFARNET, "cifar10", 8, 40, teach=0.5, dropout=0.1),
    "wrn-10-4/1": Case(4, "cifar10", 1),
    "wrn-10-4/8-f40": Case(4, "cifar10", 8, 40, teach=0.5, paper="base - 3.3 (ResNet-50)"),
    "wrn-10-4/8-f40-longer": Case(4, "cifar10", 8, 40, teach=0.5, epochs=24, views=4),
}
MINIMUM_WIDTH = 8
"""Of wide ResNets' branches: their first layer has 16 channels, and an eighth of it would be 2."""
RECIPES = {
    "mnist": TrainOptions(epochs=30, rate=4e-3, warm_up=0.1, decay=1e-5, crop_pixels=1),
    "cifar10": TrainOptions(
        epochs=12, rate=2e-3, warm_up=0.1, decay=1e-4, crop_pixels=3, flip=True
    ),
}
"""The paper trains for at least 12 epochs."""


@dataclass(frozen=True)
class Split:
    """A way to split the demo's network for digits.

    Attributes:
        devices: Branches.
        fatten, prune: Percent.
        dropout: Chance that a branch is not heard in training.
        kinds: Of the devices; empty: all are a Pi 4.
        unequal: Wider branches for devices that calculate faster.
    """

    devices: int
    fatten: int = 0
    dropout: float = 0.0
    prune: int = 0
    kinds: tuple[str, ...] = ()
    unequal: bool = False

    @property
    def text(self) -> str:
        """For the table."""
        return (
            f"{self.devices}"
            + (f"-f{self.fatten}" if self.fatten else "")
            + (", 40 % pruned" if self.prune else "")
            + (", tolerant" if self.dropout else "")
            + (f" on {', '.join(self.kinds)}" if self.kinds else "")
            + (", unequal" if self.unequal else "")
        )


MIXED = ("pi-5", "pi-4", "pi-3", "pi-zero-2")
DIGITS = (
    Split(2),
    Split(4),
    Split(8),
    Split(8, 40),
    Split(8, 40, prune=40),
    Split(8, 40, dropout=0.3),
    Split(4, 40, kinds=MIXED),
    Split(4, 40, kinds=MIXED, unequal=True),
)


def fleet_of(devices: int, kinds: Sequence[str] = ()) -> Any:
    """As many Pis, of these kinds or the same, and one that aggregates."""
    from agent.protocol.fleet import Fleet

    return Fleet.model_validate(
        {
            "shoal": 1,
            "fleet": "bench",
            "aggregator": "hub",
            "devices": [
                *(
                    {"id": f"w{i}", "kind": kind}
                    for i, kind in enumerate(kinds or ["pi-4"] * devices)
                ),
                {"id": "hub", "kind": "pi-4", "tier": "edge"},
            ],
        }
    )


def quiet(what: str, done: int, total: int) -> None:
    """No progress."""


def digits_run(split: Split, seed: int) -> dict[str, Any]:
    """Split the demo's network for digits as `shoal export --method lcp` does, and measure."""
    from exporter import pipeline
    from exporter.cost import Numbers, piece_cost
    from exporter.data import load_data
    from exporter.graph import layer_graph
    from exporter.methods.lcp.capacity import MACS_PER_S
    from exporter.methods.lcp.method import LCP
    from exporter.methods.lcp.options import LcpOptions
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    from benchmarks.digits_model import train_digits

    data = load_data("digits")
    path = CACHE / "digits.keras"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        train_digits(data, path)
    base, fleet = pipeline.load_model(path), fleet_of(split.devices, split.kinds)
    options = LcpOptions(
        fatten=split.fatten / 100,
        prune=split.prune / 100,
        fixed_point=True,
        unequal=split.unequal,
        training=TrainOptions(
            epochs=30, batch=64, rate=2e-3, decay=1e-4, part_dropout=split.dropout, seed=seed
        ),
        cache=CACHE,
        seed=seed,
    )
    method = LCP()
    design = method.design(base, data, fleet, options, quiet)
    exported = pipeline.quantize(design.pieces, data, fleet, "int8", quiet)
    settled = method.settle(design, data, fleet, options, pipeline.runner(exported))
    figures = {key: figure.value for key, figure in {**design.figures, **settled.figures}.items()}
    whole = piece_cost(layer_graph(base), Numbers.INT8)
    seconds = [
        piece_cost(layer_graph(branch.model), Numbers.INT8).macs / MACS_PER_S[device.kind]
        for branch, device in zip(design.facts.branches, fleet.workers, strict=True)
    ]
    return {
        "base": pipeline.measure_base(base, data, "int8")["accuracy_base_float"].value,
        "float": figures["accuracy_fleet_float"],
        "int8": figures["accuracy_fleet"],
        "fixed": figures["accuracy_fleet_fixed_point"],
        "one_lost": figures["accuracy_fleet_one_lost"],
        "payload": figures["fleet_payload"],
        "params": figures["parameters_fleet"],
        "params_base": whole.parameters,
        "macs_largest": figures["macs_largest"],
        "macs_base": whole.macs,
        "slowest_us": 1e6 * max(seconds),
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def counts() -> list[dict[str, Any]]:
    """Every line of COUNTS as it is counted."""
    rows = []
    for row in COUNTS:
        found = split_counts(row.model, row.split, fatten=row.fatten / 100, classes=row.classes)
        rows.append(
            {
                "model": row.model,
                "split": row.split,
                "fatten": row.fatten,
                "classes": row.classes,
                "params": found.params,
                "macs": found.macs,
                "weights": found.weights,
                "paper": row.params,
                "note": row.note,
            }
        )
    return rows


def traffic() -> list[dict[str, Any]]:
    """Pairs of devices and bytes of one inference, int8 (Fig. 11)."""
    from exporter.cost.shapes import graph_of

    rows = []
    for model in NETWORKS:
        whole = split_counts(model, 1)
        layout = whole.network.trunk(lambda width: width)
        layout.dense("logits", layout.output.name, whole.network.classes, relu=False)
        graph = graph_of(layout)
        for split in (2, 4, 8):
            branch = split_counts(model, split).branch
            own = lcp_traffic([branch.output.shape] * split)
            parallel = model_parallel_traffic(graph, split)
            rows.append(
                {
                    "model": model,
                    "split": split,
                    "lcp": [own.pairs, own.bytes],
                    "model_parallel": [parallel.pairs, parallel.bytes],
                }
            )
    return rows


Tell = Callable[[str, int, int], None]


def teller(name: str, seed: int) -> Tell:
    """Prints how far a run is."""
    began = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        print(
            f"{name} seed {seed}: {what} {done}/{total}, {time.monotonic() - began:.0f} s",
            flush=True,
        )

    return tell


def branches_of(case: Case, seed: int, trained: Any = None) -> Any:
    """Branches to be trained; fattened ones and wide ResNets are cut as a user's network is.

    Args:
        case: What to split.
        seed: Of fresh weights.
        trained: The whole network's models; each branch begins with the weights of its channels.
    """
    from exporter.methods.lcp.capacity import Fit
    from exporter.methods.lcp.method import keeps_of, untrained
    from exporter.methods.lcp.options import LcpOptions
    from exporter.methods.lcp.split import BranchSpec, Splitter
    from exporter.methods.lcp.zoo import paper_branches
    from exporter.zoo.build import keras_model
    from exporter.zoo.wrn import group_widths, wide_resnet

    share = 1 / case.split
    if isinstance(case.network, int):
        whole, least, merge = wide_resnet(10, group_widths(case.network)), MINIMUM_WIDTH, None
    elif case.fatten:
        layout = case.network.trunk(lambda width: width)
        layout.dense("logits", layout.output.name, case.network.classes, relu=False)
        whole, least, merge = keras_model(layout), 1, case.network.merge
    else:
        devices = [f"w{i}" for i in range(case.split)]
        return paper_branches(case.network, devices)
    if trained is not None:
        whole.set_weights([weight for model in trained for weight in model.get_weights()])
    splitter = Splitter(whole, minimum_width=least)
    fit = Fit((BranchSpec(share, share),) * case.split, 0)
    keeps = keeps_of(splitter, fit, case.fatten / 100)
    options = LcpOptions(fresh=trained is None, seed=seed)
    return untrained(splitter, keeps, merge or splitter.merge, fleet_of(case.split), options)


def with_views(samples: Any, options: TrainOptions, views: int) -> tuple[Any, TrainOptions]:
    """So many copies of every sample, each augmented once, and options for as many steps."""
    from exporter.data import Split as Part

    rng = np.random.default_rng([options.seed, views])
    frames = [
        augmented(samples.frames, options.crop_pixels, options.flip, rng) for _ in range(views)
    ]
    fewer = replace(options, epochs=options.epochs // views, crop_pixels=0, flip=False)
    return Part(np.concatenate(frames), np.tile(samples.labels, views)), fewer


def taught(name: str, seed: int, tell: Tell) -> tuple[Any, Any, float | None]:
    """The trained network of a case, its data, and its accuracy on validation data."""
    from exporter.data import Split as Part
    from exporter.data import load_data
    from exporter.methods.branches import pruned
    from exporter.methods.branches.network import spread
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    import keras

    from exporter.methods.lcp.method import loss_of, scores_of
    from exporter.methods.lcp.options import LcpOptions

    case = CASES[name]
    with np.load(npz_path(case.data)) as archive:
        arrays = {key: archive[key] for key in archive.files}
    x, y = arrays["x_train"], arrays["y_train"].astype(np.int64)
    data = load_data(str(npz_path(case.data)))
    training = Part(x[:-HELD_OUT], y[:-HELD_OUT])
    data = replace(data, train=training, held_out=Part(x[-HELD_OUT:], y[-HELD_OUT:]))
    keras.utils.set_random_seed(seed)
    options = replace(case.recipe, seed=seed)
    seen = data.train
    if case.views:
        seen, options = with_views(seen, options, case.views)
    trained = teacher = None
    if case.teach:
        trained = taught(f"{name.partition('/')[0]}/1", seed, tell)[0].models
        teacher = scores_of(keras.Sequential(trained))
    network = branches_of(case, seed, trained)

    def run(taken: Any, how: TrainOptions, about: str) -> float | None:
        return train(
            taken.models,
            loss_of(taken, LcpOptions(teach=case.teach, training=how)),
            seen,
            data.inputs,
            how,
            parts=case.split,
            teacher=teacher,
            score=taken.logits,
            validation=data.held_out,
            checkpoint=Checkpoint(CACHE, about),
            progress=tell,
        ).accuracy

    validation = run(network, options, name.removesuffix(f"-p{case.prune}"))
    if case.prune:
        some = data.inputs(data.train.take(spread(len(data.train))).frames)
        network = pruned(network, case.prune / 100, some)
        validation = run(network, options, name)
    return network, data, validation


def in_fixed_point(network: Any, data: Any) -> float:
    """Accuracy on test data in emulated 3.13."""
    from exporter.methods.branches.network import spread
    from exporter.methods.lcp.fixed_point import fixed_point_logits

    known = data.inputs(data.held_out.take(spread(len(data.held_out))).frames)
    logits = fixed_point_logits(network, data.inputs(data.test.frames), known)
    return float(np.mean(logits.argmax(axis=1) == data.test.labels))


def trained(name: str, seed: int) -> dict[str, Any]:
    """Train, export and measure one case."""
    from exporter import pipeline
    from exporter.cost import Numbers, piece_cost
    from exporter.graph import layer_graph
    from exporter.methods.branches import settle

    case, tell = CASES[name], teller(name, seed)
    network, data, validation = taught(name, seed, tell)
    fleet = fleet_of(case.split)
    exported = pipeline.quantize(network.pieces(data, fleet), data, fleet, "int8", tell)
    settled = settle(network, "lcp", data, fleet, pipeline.runner(exported))
    figures = {key: figure.value for key, figure in settled.figures.items()}
    cut = case.fatten or isinstance(case.network, int)
    if case.prune or cut:  # as exported: batch norm is folded away
        costs = [piece_cost(layer_graph(model), Numbers.INT8) for model in network.models]
        params = sum(cost.parameters for cost in costs)
        macs = sum(cost.macs for cost in costs)
        largest = max(cost.macs for cost in costs)
    else:
        layout = split_counts(
            "cifarnet" if case.network is CIFARNET else case.network.name,
            case.split,
            classes=case.network.classes,
            merge=case.network.merge,
        )
        params, macs, largest = layout.params, layout.macs, layout.branch.macs
    return {
        "params": params,
        "macs": macs,
        "macs_branch": largest,
        "validation": validation,
        "float": figures["accuracy_fleet_float"],
        "int8": figures["accuracy_fleet"],
        "fixed": in_fixed_point(network, data),
        "one_lost": figures.get("accuracy_fleet_one_lost"),
        "payload": figures["fleet_payload"],
        "epochs": case.recipe.epochs,
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def result() -> dict[str, Any]:
    """What was measured so far, or an empty start."""
    if (RESULTS / f"{NAME}.json").exists():
        return load(NAME)
    return {"counts": [], "traffic": [], "digits": {}, "runs": {}}


def main() -> None:
    """Count, or train."""
    for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(threads, "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("counts")
    small = commands.add_parser("digits")
    small.add_argument("--seeds", type=int, default=5)
    training = commands.add_parser("train")
    training.add_argument("cases", nargs="+", metavar="CASE", help=", ".join(CASES))
    training.add_argument("--seeds", type=int, default=3)
    again = commands.add_parser("fixed")
    again.add_argument("cases", nargs="+", metavar="CASE", help="as above")
    chosen = parser.parse_args()
    if chosen.command == "counts":
        told = result()
        told["counts"], told["traffic"] = counts(), traffic()
        told.setdefault("circumstances", circumstances("numpy"))
        save(NAME, told)
        return
    packages = ("tensorflow-cpu", "keras", "ai-edge-litert", "numpy")
    if chosen.command == "digits":
        for seed in range(chosen.seeds):
            for split in DIGITS:
                told = result()
                if str(seed) not in told["digits"].get(split.text, {}):
                    run = digits_run(split, seed)
                    told = result()
                    told["digits"].setdefault(split.text, {})[str(seed)] = run
                    told["circumstances"] = circumstances(*packages)
                    save(NAME, told)
                    print(json.dumps({split.text: run}), flush=True)
        return
    if unknown := [name for name in chosen.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are: {', '.join(CASES)}")
    if chosen.command == "fixed":
        for name in chosen.cases:
            for seed in result()["runs"].get(name, {}):
                network, data, _ = taught(name, int(seed), teller(name, int(seed)))
                told = result()
                told["runs"][name][seed]["fixed"] = in_fixed_point(network, data)
                save(NAME, told)
        return
    for seed in range(chosen.seeds):
        for name in chosen.cases:
            kept = result()["runs"].get(name, {}).get(str(seed))
            if kept and kept["epochs"] == CASES[name].recipe.epochs:
                print(f"{name} seed {seed}: kept", flush=True)
                continue
            run = trained(name, seed)
            told = result()
            told["runs"].setdefault(name, {})[str(seed)] = run
            told["circumstances"] = circumstances(
                "tensorflow-cpu", "keras", "ai-edge-litert", "numpy"
            )
            save(NAME, told)
            print(json.dumps({name: run}), flush=True)


if __name__ == "__main__":
    main()
