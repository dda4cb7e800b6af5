"""DDNN's tables on the multi-view cars: schemes, thresholds, lost devices, filters, ablations.

    python -m benchmarks.ddnn [--seeds 5] [--only default exact table1 filters ablation ...]

Trains with the code that `shoal export` runs and evaluates in float (export is exact: see `exact`).
Each run is kept in benchmarks/results/ddnn.json as soon as it is done; what is there is not run
again. `python -m benchmarks.run ddnn --tables` draws the tables.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from agent.protocol.plan import Fusion
from benchmarks import ddnn_live
from benchmarks.datasets import SHARED, npz_path
from benchmarks.record import BRIEF, RESULTS, circumstances, machine_line
from exporter.cost import TierTraffic, bytes_per_sample
from exporter.methods.ddnn.evaluate import Said, inputs_of_parts, keras_parts, likeliest
from exporter.methods.ddnn.exits import answered
from exporter.methods.ddnn.network import DDNN, FUSIONS, Architecture
from exporter.methods.ddnn.train import PAPER_WEIGHTS, Augmentation, TrainOptions, train
from exporter.quantize.native_stderr import start_tensorflow

NAME = "ddnn"
CLASSES = ("car", "bus", "person")
SPLITS = ("851", "temporal")
CAMERAS = 6
THRESHOLD = 0.8
"""The paper's."""
SWEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SHORT = {Fusion.MAX: "MP", Fusion.MEAN: "AP", Fusion.CONCAT: "CC"}
RAW_FRAME_BYTES = 32 * 32 * 3
EXACT_IMAGES = 1_000
PAIRS = tuple(combinations(range(CAMERAS), 2))
CHANCES = (0.0, 0.35, 0.5)
"""Of device dropout, beside the default's."""


@dataclass(frozen=True)
class Data:
    """Training and test samples: frames (N, D, H, W, C), presence (N, D), labels (N,)."""

    train: tuple[np.ndarray, np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray, np.ndarray]

    def only(self, cameras: tuple[int, ...]) -> Data:
        """The same with some cameras; training samples that none of them sees are left out."""
        (x, p, y), (xt, pt, yt) = self.train, self.test
        keep = list(cameras)
        seen = p[:, keep].any(axis=1)
        return Data((x[seen][:, keep], p[seen][:, keep], y[seen]), (xt[:, keep], pt[:, keep], yt))


def mvmc(split: str) -> Data:
    """A split of the scene; samples whose views are all black are left out: nobody sees them."""
    path = SHARED / "mvmc" / "mvmc_epfl_reconstructed.npz"
    if not path.exists():
        raise SystemExit(f"{path} is not there: set SHOAL_SHARED_DATA to the folder of INDEX.md")
    with np.load(path) as archive:
        frames, labels = archive["X"], archive["label"].astype(np.int64)
        middle = "_" if split == "temporal" else ""
        parts = [archive[f"idx{middle}{split}_{part}"] for part in ("train", "test")]
    present = frames.any(axis=(2, 3, 4))
    seen = [index[present[index].any(axis=1)] for index in parts]
    return Data(*((frames[i], present[i], labels[i]) for i in seen))


def tiles(name: str) -> Data:
    """Images cut into 3 x 2 tiles, one a device; padded where their size does not divide."""
    with np.load(npz_path(name)) as archive:
        arrays = {key: archive[key] for key in archive.files}
    parts = []
    for part, count in (("train", 10_000), ("test", 2_000)):
        x = arrays[f"x_{part}"][:count]
        height, width = x.shape[1:3]
        rows, columns = -(-height // 3), -(-width // 2)
        margin = ((0, 0), (0, 3 * rows - height), (0, 2 * columns - width), (0, 0))
        x = np.pad(x, margin, mode="edge")
        views = x.reshape(len(x), 3, rows, 2, columns, x.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
        views = views.reshape(len(x), 6, rows, columns, x.shape[-1])
        labels = arrays[f"y_{part}"][:count].astype(np.int64)
        parts.append((views, np.ones((len(x), 6), bool), labels))
    return Data(*parts)


@dataclass(frozen=True)
class Recipe:
    """What is trained, apart from split and seed."""

    architecture: dict[str, Any]
    training: TrainOptions
    blind: bool = False
    """Absent views are fused like any other."""


DEFAULT = Recipe({}, TrainOptions())
FULL_BATCH = 10_000
ABLATIONS = {
    "as written: full batch, absent views fused as they are, binary cloud": Recipe(
        {"cloud": "binary"},
        TrainOptions(batch=FULL_BATCH, weights=PAPER_WEIGHTS, device_dropout=0.0),
        blind=True,
    ),
    "absent views skipped by max, zero in concat": Recipe(
        {"cloud": "binary"},
        TrainOptions(batch=FULL_BATCH, weights=PAPER_WEIGHTS, device_dropout=0.0),
    ),
    "and batches of 64": Recipe(
        {"cloud": "binary"}, TrainOptions(weights=PAPER_WEIGHTS, device_dropout=0.0)
    ),
    "and every device's own exit in the loss": Recipe(
        {"cloud": "binary"}, TrainOptions(device_dropout=0.0)
    ),
    "and a float cloud": Recipe({}, TrainOptions(device_dropout=0.0)),
    "and 20 % device dropout (the default)": DEFAULT,
    "default with a binary cloud": Recipe({"cloud": "binary"}, TrainOptions()),
    "default with the paper's loss": Recipe({}, TrainOptions(weights=PAPER_WEIGHTS)),
    "default with shifted, mirrored, brighter or darker views": Recipe(
        {}, TrainOptions(augmentation=Augmentation(2, True, 0.2))
    ),
    "default with 4 more filters for the device's exit": Recipe(
        {"score_filters": 4}, TrainOptions()
    ),
}


def trained(data: Data, recipe: Recipe, seed: int) -> DDNN:
    """A network, trained."""
    import keras

    x, present, y = data.train
    keras.utils.set_random_seed(seed)
    network = DDNN(
        Architecture(
            frame=x.shape[2:],
            classes=int(y.max()) + 1,
            devices=x.shape[1],
            **recipe.architecture,
        )
    )
    seen = np.ones_like(present) if recipe.blind else present
    train(network, x, seen, y, replace(recipe.training, seed=seed), lambda *_: None)
    return network


class Judge:
    """Accuracies of a trained network on test samples."""

    def __init__(self, network: DDNN, data: Data, recipe: Recipe) -> None:
        x, present, self.labels = data.test
        self.network = network
        self.parts = keras_parts(network, likeliest(data.train[2]))
        seen = np.ones_like(present) if recipe.blind else present
        self.said: Said = self.parts.listen(x, seen)

    def exits(self, lost: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
        """Scores of every exit when some cameras are lost."""
        votes = np.ones((1, self.said.present.shape[1]), bool)
        votes[:, list(lost)] = False
        return self.parts.exits(self.said, votes)

    def accuracy(self, scores: np.ndarray) -> float:
        """Share of samples whose best score is their label's."""
        return float((scores.argmax(axis=1) == self.labels).mean())

    def overall(self, exits: dict[str, np.ndarray], threshold: float) -> dict[str, float]:
        """Local exit share, accuracy and bytes (equation 1) of one threshold."""
        said = answered(exits, (threshold,))
        (share,) = said.shares(2)
        height, width, filters = self.network.architecture.feature_shape
        tier = TierTraffic(self.network.architecture.classes, filters, height * width, share)
        return {
            "local_exit": share,
            "overall": float((said.classes == self.labels).mean()),
            "bytes": bytes_per_sample([tier])[0],
        }

    def summary(self, lost: tuple[int, ...] = ()) -> dict[str, float]:
        """Accuracy of both exits, and what THRESHOLD makes of them."""
        exits = self.exits(lost)
        return {
            "local": self.accuracy(exits["local"]),
            "cloud": self.accuracy(exits["cloud"]),
            **self.overall(exits, THRESHOLD),
        }

    def individual(self) -> list[float]:
        """Each device's own exit over all samples: what it does not see, it gets wrong."""
        right = self.said.scores.argmax(axis=2) == self.labels[:, None]
        return (right & self.said.present).mean(axis=0).tolist()


def _key(cameras: Iterable[int]) -> str:
    return ",".join(map(str, cameras))


def default_run(data: Data, seed: int) -> dict[str, Any]:
    """Everything about the default network: thresholds, each lost subset, cameras one by one."""
    judge = Judge(trained(data, DEFAULT, seed), data, DEFAULT)
    exits = judge.exits()
    everybody = range(CAMERAS)
    lost = {
        _key(gone): judge.summary(gone)
        for count in range(1, CAMERAS)
        for gone in combinations(everybody, count)
    }
    individual = judge.individual()
    order = sorted(everybody, key=lambda i: individual[i])
    return {
        **judge.summary(),
        "individual": individual,
        "sweep": {str(t): judge.overall(exits, t) for t in SWEPT},
        "lost": lost,
        "added": [
            judge.summary(tuple(set(everybody) - set(order[:n]))) for n in range(1, CAMERAS + 1)
        ],
    }


def plain_run(data: Data, recipe: Recipe, seed: int) -> dict[str, Any]:
    """A network of another recipe: its accuracies, and with each camera lost."""
    judge = Judge(trained(data, recipe, seed), data, recipe)
    cameras = data.train[0].shape[1]
    lost = [judge.summary((i,)) for i in range(cameras)] if cameras > 1 else []
    worst = {k: min(x[k] for x in lost) for k in ("local", "cloud", "overall")} if lost else {}
    return {**judge.summary(), "worst_lost": worst}


def unseen_run(data: Data) -> dict[str, Any]:
    """What each two cameras hide: samples that nobody else sees, by class, in test and training.

    `least_points` is what any rule loses that names one class for these test samples, `by_training`
    what one loses that names the most frequent class of such training samples.
    """
    (_, seen, taught), (_, present, labels) = data.train, data.test
    pairs = {}
    for gone in PAIRS:
        hidden, before = (
            np.bincount(y[~np.delete(p, gone, axis=1).any(axis=1)], minlength=int(taught.max()) + 1)
            for p, y in ((present, labels), (seen, taught))
        )
        pairs[_key(gone)] = {
            "test": hidden.tolist(),
            "training": before.tolist(),
            "least_points": float((hidden.sum() - hidden.max()) / len(labels)),
            "by_training": float((hidden.sum() - hidden[before.argmax()]) / len(labels)),
        }
    return {"of": len(labels), "pairs": pairs}


def dropout_run(data: Data, chance: float, seed: int) -> dict[str, Any]:
    """The default with another chance of device dropout: what one and two lost devices cost."""
    recipe = replace(DEFAULT, training=TrainOptions(device_dropout=chance))
    judge = Judge(trained(data, recipe, seed), data, recipe)
    ones = [(i,) for i in range(CAMERAS)]
    return {
        **judge.summary(),
        "lost": {_key(gone): judge.summary(gone) for gone in (*ones, *PAIRS)},
    }


def exact_run(data: Data) -> dict[str, Any]:
    """Wrong bits and scores of every executor on real images, and the sizes of a device part."""
    from exporter.methods.ddnn.fold import fold
    from exporter.methods.ddnn.packed import execute, pack, unpack
    from exporter.methods.ddnn.tflite_block import block_tflite, smallest_tflite
    from exporter.quantize import arena_bytes, infer

    network = trained(data, DEFAULT, 0)
    x, present, _ = data.train
    fed = inputs_of_parts(network, x, present)
    wrong: dict[str, int] = {}
    bits = 0
    sizes = []
    for i, part in enumerate(network.devices):
        frames = np.concatenate([x[present[:, i], i], data.test[0][data.test[1][:, i], i]])
        frames = frames[: EXACT_IMAGES // CAMERAS + 1]
        inputs = frames.astype(np.float32)
        features, _ = (np.asarray(told) for told in part(inputs, training=False))
        block = fold(part, centre=0, calibration=fed[part.name])
        content = pack(block)
        said = execute(unpack(content), frames)
        bits += features.size
        _count(wrong, "packed numpy", said.bits != (features > 0))
        for width in (8, 4):
            tflite = block_tflite(block, {}, weight_bits=width)
            for runtime in ("litert-reference", "litert-optimized", "litert", "tflite-micro"):
                told = infer(tflite, inputs, runtime)
                key = f"{runtime}, int{width}"
                _count(wrong, key, told["features"] != features)
                _count(wrong, key, told["scores"] != said.scores)
        weights = sum(
            -(-layer.weights[0].size // 8) * len(layer.weights)
            for layer in (*block.convs, block.exit)
        )
        smallest = smallest_tflite(block, {})
        sizes.append(
            {
                "packed_bytes": len(content),
                "weight_bytes": weights,
                "int8_bytes": len(block_tflite(block, {})),
                "tflite_bytes": len(smallest),
                "arena_bytes": arena_bytes(smallest),
            }
        )
    largest = {key: max(size[key] for size in sizes) for key in sizes[0]}
    images = CAMERAS * (EXACT_IMAGES // CAMERAS + 1)
    return {"images": images, "bits": bits, "wrong": wrong, **largest}


def _count(wrong: dict[str, int], key: str, differs: np.ndarray) -> None:
    wrong[key] = wrong.get(key, 0) + int(differs.sum())


Job = tuple[str, Callable[[], dict[str, Any]]]


def jobs(seeds: int, only: list[str]) -> Iterator[Job]:
    """(name, what to run), the most wanted first: all of seed 0, then of seed 1 ..."""
    data = {split: mvmc(split) for split in SPLITS}

    def job(name: str, split: str, recipe: Recipe, seed: int, cameras: Any = None) -> Job:
        chosen = data[split] if cameras is None else data[split].only(cameras)
        return f"{name}|{split}|{seed}", lambda: plain_run(chosen, recipe, seed)

    if "unseen" in only:
        for split in SPLITS:
            yield f"unseen|{split}|0", lambda s=split: unseen_run(data[s])
    if "exact" in only:
        yield "exact|temporal|0", lambda: exact_run(data["temporal"])
    if "default" in only:
        for seed in range(seeds):
            for split in SPLITS:
                yield f"default|{split}|{seed}", lambda s=split, n=seed: default_run(data[s], n)
    for seed in range(seeds):
        for split in SPLITS:
            if "table1" in only:
                for scores in FUSIONS:
                    for features in FUSIONS:
                        shape = {"score_fusion": scores, "feature_fusion": features}
                        name = f"table1 {SHORT[scores]}-{SHORT[features]}"
                        yield job(name, split, replace(DEFAULT, architecture=shape), seed)
            if "filters" in only:
                for filters in (1, 2, 8):
                    recipe = replace(DEFAULT, architecture={"filters": (filters,)})
                    yield job(f"filters {filters}", split, recipe, seed)
            if "ablation" in only:
                for name, recipe in ABLATIONS.items():
                    yield job(f"ablation {name}", split, recipe, seed)
            if "missing" in only:
                for gone in range(CAMERAS):
                    cameras = tuple(i for i in range(CAMERAS) if i != gone)
                    yield job(f"missing {gone}", split, DEFAULT, seed, cameras)
            if "dropout" in only:
                for chance in CHANCES:
                    yield (
                        f"dropout {chance:g}|{split}|{seed}",
                        lambda s=split, c=chance, n=seed: dropout_run(data[s], c, n),
                    )
    if "tiles" in only:
        quick = replace(DEFAULT, training=TrainOptions(epochs=20))
        for name in ("mnist", "cifar10"):
            yield f"tiles {name}|-|0", lambda n=name: plain_run(tiles(n), quick, 0)


KINDS = [
    *("unseen", "default", "exact", "table1", "filters", "ablation", "missing", "dropout", "tiles")
]


def read() -> dict[str, Any]:
    """What was measured so far, or an empty start."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": {}}


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    arguments = parser.parse_args()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    start_tensorflow()
    for name, run in jobs(arguments.seeds, arguments.only):
        if name in read()["runs"]:
            continue
        import keras

        keras.backend.clear_session()
        started = time.monotonic()
        result = {**_rounded(run()), "seconds": round(time.monotonic() - started)}
        kept = read()
        kept["runs"][name] = result
        kept["circumstances"] = circumstances("tensorflow-cpu", "keras")
        RESULTS.mkdir(exist_ok=True)
        part = RESULTS / f"{NAME}.json.part"
        part.write_text(json.dumps(kept, indent=1) + "\n")
        part.replace(RESULTS / f"{NAME}.json")
        shown = {k: v for k, v in result.items() if not isinstance(v, dict | list)}
        print(name, json.dumps(shown), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


# Tables.

PAPER_TABLE_I = {
    "MP-MP": (95, 91),
    "MP-CC": (98, 98),
    "AP-AP": (86, 98),
    "AP-CC": (75, 96),
    "CC-CC": (85, 94),
    "AP-MP": (88, 93),
    "MP-AP": (89, 97),
    "CC-MP": (77, 87),
    "CC-AP": (80, 94),
}
PAPER_TABLE_II = {
    0.1: (0, 96, 140),
    0.3: (0.58, 96, 139),
    0.5: (1.75, 96, 138),
    0.6: (2.92, 96, 136),
    0.7: (22.81, 96, 111),
    0.8: (60.82, 97, 62),
    0.9: (83.04, 96, 34),
    1.0: (100, 92, 12),
}


def draw() -> str:
    """The tables of everything in results/ddnn.json and ddnn_live.json, Markdown."""
    kept = read()
    runs = kept["runs"]
    lines = [
        "# DDNN: exits, fusion and lost devices on six cameras",
        "",
        "The paper's scene, rebuilt. *851* is the paper's random split, in which parked cars "
        "recur; *temporal* tests on later frames only. Mean +- deviation over seeds (their number "
        "in brackets); test data, T = 0.8 as in the paper unless it is swept; 4 filters, MP-CC.",
        "",
        *_goals(runs),
        "",
        *_table_one(runs),
        "",
        *_table_two(runs),
        "",
        BRIEF,
        "",
        *ddnn_live.draw(),
        "",
        *_pairs(runs),
        "",
        *_lost(runs),
        "",
        *_dropout(runs),
        "",
        *_added(runs),
        "",
        *_named(runs, "filters", "| filters | split | local | cloud | overall | bytes |"),
        "",
        *_named(
            runs, "ablation", "| recipe | split | local | cloud | overall | bytes | worst loss |"
        ),
        *_tiles(runs),
    ]
    return "\n".join([*lines, "", f"Measured at {machine_line(kept)}.", ""])


def _tiles(runs: dict[str, Any]) -> list[str]:
    tiled = [(k.split("|")[0].split()[1], v) for k, v in runs.items() if k.startswith("tiles")]
    if not tiled:
        return []
    return [
        "",
        "Images cut into 3 x 2 tiles, one a device, 10 000 for training, 20 epochs:",
        "",
        "| data | local | cloud | overall | answered locally | bytes | worst device lost |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {_p(r['local'])} | {_p(r['cloud'])} | {_p(r['overall'])} "
            f"| {_p(r['local_exit'])} | {r['bytes']:.1f} | {_p(r['worst_lost']['overall'])} |"
            for name, r in tiled
        ),
    ]


def _p(value: float) -> str:
    return f"{100 * value:.1f} %"


def of(runs: dict[str, Any], name: str, split: str) -> list[dict[str, Any]]:
    """All seeds of one kind of run, on one split."""
    return [r for key, r in sorted(runs.items()) if key.startswith(f"{name}|{split}|")]


def _mean(rows: list[dict[str, Any]], *path: str, percent: bool = True) -> str:
    values = []
    for row in rows:
        value: Any = row
        for step in path:
            value = value[step]
        values.append(value * (100 if percent else 1))
    if not values:
        return "-"
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread} ({len(values)})"


def _worst(rows: list[dict[str, Any]], lost: int) -> list[dict[str, float]]:
    """Of each seed, the set of so many lost devices that costs most overall."""
    found = []
    for row in rows:
        sets = [v for k, v in row["lost"].items() if k.count(",") == lost - 1]
        worst = min(sets, key=lambda x: x["overall"])
        found.append({"overall": worst["overall"], "points": row["overall"] - worst["overall"]})
    return found


def _goals(runs: dict[str, Any]) -> list[str]:
    rows = {split: of(runs, "default", split) for split in SPLITS}
    lines = [
        "| what | paper | goal 851 | 851 | goal temporal | temporal |",
        "|---|---|---|---|---|---|",
    ]

    def line(what: str, paper: str, goals: tuple[str, str], cells: list[str]) -> None:
        lines.append(f"| {what} | {paper} | {goals[0]} | {cells[0]} | {goals[1]} | {cells[1]} |")

    def each(*path: str, percent: bool = True) -> list[str]:
        return [_mean(rows[split], *path, percent=percent) for split in SPLITS]

    line("local accuracy, %", "98", (">= 99", ">= 96.5"), each("local"))
    line("cloud accuracy, %", "98", (">= 99", ">= 97"), each("cloud"))
    line("overall accuracy, %", "97", (">= 99", ">= 97.5"), each("overall"))
    line("bytes per sample", "62", ("<= 20", "<= 25"), each("bytes", percent=False))
    line("answered locally, %", "60.82", ("-", "-"), each("local_exit"))
    one = [_mean(_worst(rows[split], 1), "overall") for split in SPLITS]
    line("worst single device lost, overall, %", "> 95", (">= 97.5", ">= 96"), one)
    two = [_mean(_worst(rows[split], 2), "points") for split in SPLITS]
    line("worst two devices lost, points", "about 4", ("<= 3", "<= 4"), two)
    ratio = [
        _mean([{"x": RAW_FRAME_BYTES / r["bytes"]} for r in rows[split]], "x", percent=False)
        for split in SPLITS
    ]
    line("raw frame / bytes sent", "> 20", (">= 120", ">= 120"), ratio)
    for split in SPLITS:
        lines += ["", _hidden(runs, split)]
    exact = runs.get("exact|temporal|0")
    if exact:
        wrong = sum(exact["wrong"].values())
        lines += [
            "",
            f"Device part, 4 filters: {exact['packed_bytes']} B packed (weights "
            f"{exact['weight_bytes']} B; paper < 2 KB, goal 0.75 KB), {exact['tflite_bytes']:,} B "
            f"as .tflite ({exact['int8_bytes']:,} B with int8 weights), arena "
            f"{exact['arena_bytes']:,} B. Exactness: {exact['images']:,} real images, "
            f"{exact['bits']:,} bits and their scores, {wrong} wrong in "
            f"{len(exact['wrong'])} executors ({', '.join(exact['wrong'])}).",
        ]
    return lines


def _hidden(runs: dict[str, Any], split: str) -> str:
    """Why the worst pair of lost cameras costs what it costs."""
    rows, unseen = of(runs, "default", split), runs[f"unseen|{split}|0"]
    pair = max(unseen["pairs"], key=lambda key: _points(rows, key))
    told = unseen["pairs"][pair]
    first, second = pair.split(",")

    def classes(counts: list[int]) -> str:
        return ", ".join(f"{n} {name}" for n, name in zip(counts, CLASSES, strict=True) if n)

    return (
        f"Two devices lost, {split}: the worst are cameras {first} and {second}. "
        f"{sum(told['test'])} of {unseen['of']} test samples are seen by them alone "
        f"({classes(told['test'])}); of such training samples there are "
        f"{classes(told['training'])}. Whoever names the class that is most frequent in training "
        f"loses {100 * told['by_training']:.1f} points by these samples alone, whoever names any "
        f"one class at least {100 * told['least_points']:.1f}. Measured: "
        f"{_points(rows, pair):.1f} points."
    )


def _points(rows: list[dict[str, Any]], pair: str) -> float:
    """Mean points that a lost set costs overall."""
    return float(np.mean([100 * (r["overall"] - r["lost"][pair]["overall"]) for r in rows]))


def _pairs(runs: dict[str, Any]) -> list[str]:
    lines = [
        "Pairs of lost devices: test samples that nobody else sees, points lost by them where the "
        "class is guessed that is most frequent among such training samples, and where one knew "
        "the best single guess; points lost overall, measured, the worst five:",
        "",
        "| split | cameras | seen by them alone | by training | by the best guess | measured |",
        "|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        rows, pairs = of(runs, "default", split), runs[f"unseen|{split}|0"]["pairs"]
        for pair in sorted(pairs, key=lambda key: -_points(rows, key))[:5]:
            told = pairs[pair]
            cells = [100 * told["by_training"], 100 * told["least_points"], _points(rows, pair)]
            lines.append(
                f"| {split} | {pair.replace(',', ' and ')} | {sum(told['test'])} | "
                + " | ".join(f"{x:.1f}" for x in cells)
                + " |"
            )
    return lines


def _dropout(runs: dict[str, Any]) -> list[str]:
    lines = [
        "Device dropout, and what losses then cost:",
        "",
        "| chance | split | overall, % | bytes | worst one lost, overall, % "
        "| worst two lost, points | the second worst pair, points |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {**{f"dropout {c:g}": c for c in CHANCES}, "default": DEFAULT.training.device_dropout}
    for name, chance in sorted(names.items(), key=lambda item: item[1]):
        for split in SPLITS:
            rows = of(runs, name, split)
            if not rows:
                continue
            costs = sorted((_points(rows, _key(pair)) for pair in PAIRS), reverse=True)
            cells = [
                _mean(rows, "overall"),
                _mean(rows, "bytes", percent=False),
                _mean(_worst(rows, 1), "overall"),
                _mean(_worst(rows, 2), "points"),
                f"{costs[1]:.1f}",
            ]
            lines.append(f"| {chance:g} | {split} | {' | '.join(cells)} |")
    return lines


def _table_one(runs: dict[str, Any]) -> list[str]:
    lines = [
        "Table I, local / cloud accuracy, %:",
        "",
        "| scheme | paper | 851 local | 851 cloud | temporal local | temporal cloud |",
        "|---|---|---|---|---|---|",
    ]
    for scheme, (local, cloud) in PAPER_TABLE_I.items():
        cells = [
            _mean(of(runs, f"table1 {scheme}", split), what)
            for split in SPLITS
            for what in ("local", "cloud")
        ]
        lines.append(f"| {scheme} | {local} / {cloud} | {' | '.join(cells)} |")
    return lines


def _table_two(runs: dict[str, Any]) -> list[str]:
    lines = [
        "Table II and Fig. 7, thresholds: local exit % / overall % / bytes per sample:",
        "",
        "| T | paper | 851 | temporal |",
        "|---|---|---|---|",
    ]
    for t in SWEPT:
        paper = " / ".join(map(str, PAPER_TABLE_II[t])) if t in PAPER_TABLE_II else "-"
        cells = []
        for split in SPLITS:
            rows = of(runs, "default", split)
            means = [
                np.mean([r["sweep"][str(t)][what] for r in rows])
                for what in ("local_exit", "overall", "bytes")
                if rows
            ]
            cells.append(
                f"{100 * means[0]:.1f} / {100 * means[1]:.1f} / {means[2]:.0f}" if means else "-"
            )
        lines.append(f"| {t} | {paper} | {' | '.join(cells)} |")
    return lines


def _lost(runs: dict[str, Any]) -> list[str]:
    lines = [
        "Lost devices (Fig. 10), overall %: without retraining, as a device that dies; retrained "
        "without it, as in the paper's code:",
        "",
        "| lost | 851 as it is | 851 retrained | temporal as it is | temporal retrained |",
        "|---|---|---|---|---|",
    ]
    for camera in range(CAMERAS):
        cells = []
        for split in SPLITS:
            cells.append(_mean(of(runs, "default", split), "lost", str(camera), "overall"))
            cells.append(_mean(of(runs, f"missing {camera}", split), "overall"))
        lines.append(f"| camera {camera} | {' | '.join(cells)} |")
    for count in range(1, CAMERAS):
        cells = []
        for split in SPLITS:
            rows = of(runs, "default", split)
            cells += [_mean(_worst(rows, count), "overall"), "-"] if rows else ["-", "-"]
        lines.append(f"| worst {count} | {' | '.join(cells)} |")
    return lines


def _added(runs: dict[str, Any]) -> list[str]:
    lines = [
        "Cameras added one by one, the weakest first (Fig. 8), local / cloud / overall %:",
        "",
        "| cameras | 851 | temporal |",
        "|---|---|---|",
    ]
    for n in range(CAMERAS):
        cells = []
        for split in SPLITS:
            rows = of(runs, "default", split)
            means = [
                np.mean([100 * r["added"][n][what] for r in rows])
                for what in ("local", "cloud", "overall")
                if rows
            ]
            cells.append(" / ".join(f"{x:.1f}" for x in means) or "-")
        lines.append(f"| {n + 1} | {' | '.join(cells)} |")
    return lines


def _named(runs: dict[str, Any], kind: str, head: str) -> list[str]:
    title = {"filters": "Filters (Fig. 9):", "ablation": "What each step brings:"}[kind]
    lines = [title, "", head, "|" + "---|" * (head.count("|") - 1)]
    names = list(dict.fromkeys(k.split("|")[0] for k in runs if k.startswith(f"{kind} ")))
    if kind == "filters":
        names = [*(f"filters {n}" for n in (1, 2)), "default", "filters 8"]
    for name in names:
        for split in SPLITS:
            rows = of(runs, name, split)
            if not rows:
                continue
            label = "4" if name == "default" else name.removeprefix(f"{kind} ")
            cells = [_mean(rows, what) for what in ("local", "cloud", "overall")]
            cells.append(_mean(rows, "bytes", percent=False))
            if kind == "ablation":
                cells.append(_mean(rows, "worst_lost", "overall"))
            lines.append(f"| {label} | {split} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
