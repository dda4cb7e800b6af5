"""`shoal plan`, `export`, `report`, `cost`. Light to import: TensorFlow comes with the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from exporter.methods.face import Progress

F = TypeVar("F", bound=Callable[..., Any])

METHOD_NAMES = ("snn", "ddnn", "lcp", "nonn", "layerwise", "edgent")
TARGET_NAMES = ("tflm", "c", "arduino", "esp-idf", "zephyr")


def _inputs(command: F) -> F:
    """The arguments and options that planning and exporting share."""
    options = [
        click.argument(
            "model", required=False, type=click.Path(path_type=Path), metavar="[MODEL.keras]"
        ),
        click.option("--data", required=True, metavar="NPZ|FOLDER|NAME", help=_DATA_HELP),
        click.option(
            "--fleet",
            default="fleet.yaml",
            show_default=True,
            type=click.Path(path_type=Path),
            help="The fleet file.",
        ),
        click.option("--method", default="snn", show_default=True, type=click.Choice(METHOD_NAMES)),
        click.option(
            "--max-drop",
            default=0.5,
            show_default=True,
            type=click.FloatRange(0, 100),
            help="Accuracy that pruning may cost each piece, in points.",
        ),
        click.option(
            "--keep",
            type=click.FloatRange(0.01, 1.0),
            help="Prune each piece down to this share of the base's parameters instead.",
        ),
        click.option(
            "--criterion",
            default="influence",
            show_default=True,
            type=click.Choice(["influence", "energy", "capnn_w", "capnn_m", "capnn_b"]),
            help="What pruning goes by: damage to a piece's outcomes, or the paper's firing rates.",
        ),
        click.option(
            "--quick",
            is_flag=True,
            help="Prune in larger steps: a third of the time, a little more damage.",
        ),
        click.option(
            "--compensate",
            is_flag=True,
            help="Re-solve the next layer's weights in closed form after pruning.",
        ),
        click.option(
            "--distill",
            default=0,
            show_default=True,
            metavar="EPOCHS",
            type=click.IntRange(0, 5),
            help="Then train each piece to agree with the base, without labels.",
        ),
        click.option(
            "--outcomes",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "rest", "own"]),
            help="Entropy over a piece's own classes and the rest, or (as the paper) own alone.",
        ),
        click.option(
            "--fusion",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "min_entropy", "max_confidence", "entropy_mlp", "mean"]),
            help="How the aggregator joins answers, or by mean the scores of all classes: the best "
            "on held-out data, or this.",
        ),
        click.option(
            "--candidates",
            default=5,
            show_default=True,
            type=click.IntRange(min=1),
            help="Partitions of the classes that are pruned and evaluated for real.",
        ),
        click.option(
            "--workers",
            default=0,
            type=click.IntRange(0),
            help="Processes of the search; 0 = one a core.",
        ),
        click.option("--dask", metavar="SCHEDULER", help="Spread the search over a Dask cluster."),
        click.option(
            "--cache",
            default=".cache/shoal",
            show_default=True,
            type=click.Path(path_type=Path, file_okay=False),
            help="Where finished steps of a search are kept.",
        ),
        click.option("--seed", default=0, show_default=True, type=click.IntRange(0)),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _ddnn_inputs(command: F) -> F:
    """The options of `--method ddnn` alone."""
    fusions = click.Choice(["max", "mean", "concat"])
    options = [
        click.option(
            "--filters",
            "ddnn_filters",
            multiple=True,
            type=click.IntRange(1),
            help="ddnn: filters of a device's ConvP block; repeat for more blocks. Default: 4.",
        ),
        click.option(
            "--raw", is_flag=True, help="ddnn: devices send their frames, the cloud does it all."
        ),
        click.option(
            "--score-fusion",
            default="max",
            show_default=True,
            type=fusions,
            help="ddnn: how devices' scores are joined.",
        ),
        click.option(
            "--feature-fusion",
            default="concat",
            show_default=True,
            type=fusions,
            help="ddnn: how devices' features are joined.",
        ),
        click.option(
            "--cloud",
            default="float",
            show_default=True,
            type=click.Choice(["float", "binary"]),
            help="ddnn: what the cloud's blocks calculate with before quantization.",
        ),
        click.option(
            "--loss",
            default="authors",
            show_default=True,
            type=click.Choice(["authors", "paper"]),
            help="ddnn: train every device's own exit too, or fused exits alone.",
        ),
        click.option(
            "--epochs",
            type=click.IntRange(1),
            help="ddnn, lcp, nonn, edgent: passes over the training data. "
            "Default: 100, 30, 60, 20.",
        ),
        click.option(
            "--device-dropout",
            type=click.FloatRange(0, 1, max_open=True),
            help="ddnn, lcp, nonn: chance that training does without a device, so that a loss is "
            "nothing new. Default: 0.2, 0, 0.2.",
        ),
        click.option(
            "--exits",
            default="accuracy",
            show_default=True,
            type=click.Choice(["accuracy", "bytes", "latency"]),
            help="ddnn: what exit thresholds are chosen for; the latter two lose at most half a "
            "point of the best accuracy.",
        ),
        click.option(
            "--exit-threshold",
            "exit_thresholds",
            multiple=True,
            type=click.FloatRange(0, 1),
            metavar="T",
            help="ddnn: exit at this normalized entropy instead of choosing one (the paper: 0.8); "
            "once for each exit below the last.",
        ),
        click.option(
            "--max-bytes",
            type=click.FloatRange(0),
            help="ddnn: the most that one device may send per sample on average.",
        ),
        click.option(
            "--max-latency",
            type=click.FloatRange(0),
            metavar="MS",
            help="ddnn: the longest mean time on the links, estimated.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _lcp_inputs(command: F) -> F:
    """The options of `--method lcp` alone."""
    options = [
        click.option(
            "--merge",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "sum", "concat"]),
            help="lcp: how branches' features are joined: as suits the network, or so.",
        ),
        click.option(
            "--fatten",
            type=click.FloatRange(0),
            metavar="PERCENT",
            help="lcp: how much wider branches are than fits are first found; by default wider and "
            "wider in steps of 10 until --task-error is met.",
        ),
        click.option(
            "--task-error",
            default=1.0,
            show_default=True,
            type=click.FloatRange(0),
            help="lcp: accuracy that the split may cost on validation data, in points.",
        ),
        click.option(
            "--unequal", is_flag=True, help="lcp: wider branches for devices that calculate faster."
        ),
        click.option(
            "--fresh", is_flag=True, help="lcp: draw new weights instead of the base's channels'."
        ),
        click.option(
            "--teach",
            default=0.5,
            show_default=True,
            type=click.FloatRange(0, 1),
            help="lcp: share of the loss that is the base's scores, the rest being labels.",
        ),
        click.option(
            "--prune",
            default=0.0,
            show_default=True,
            metavar="PERCENT",
            type=click.FloatRange(0, 100, max_open=True),
            help="lcp: channels that trained branches lose before they are trained on.",
        ),
        click.option(
            "--fixed-point", is_flag=True, help="lcp: also measure 3.13 fixed point, emulated."
        ),
        click.option(
            "--shift",
            default=0,
            show_default=True,
            metavar="PIXELS",
            type=click.IntRange(0),
            help="lcp, nonn, edgent: shift training images by up to so many pixels.",
        ),
        click.option(
            "--flip", is_flag=True, help="lcp, nonn, edgent: mirror half of the training images."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _nonn_inputs(command: F) -> F:
    """The options of `--method nonn` alone."""
    options = [
        click.option(
            "--students",
            default="auto",
            show_default=True,
            type=click.Choice(["auto", "wrn10", "wrn16", "wrn22", "dense"]),
            help="nonn: what students are: wide residual networks of so many layers, or dense "
            "ones; wrn16 for images.",
        ),
        click.option(
            "--ratio",
            default=10.0,
            show_default=True,
            type=click.FloatRange(0, min_open=True),
            help="nonn: the model has at least so many times the parameters of a student.",
        ),
        click.option(
            "--max-macs",
            type=click.FloatRange(0, min_open=True),
            help="nonn: the most multiply-accumulates of one student.",
        ),
        click.option(
            "--max-energy",
            type=click.FloatRange(0, min_open=True),
            metavar="MJ",
            help="nonn: the most energy of one student's inference, estimated.",
        ),
        click.option(
            "--beta",
            default=100.0,
            show_default=True,
            type=click.FloatRange(0),
            help="nonn: how much the model's activations count beside its answers (paper: 10000).",
        ),
        click.option(
            "--rate",
            default=2e-3,
            show_default=True,
            type=click.FloatRange(0, min_open=True),
            help="nonn: peak learning rate.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _edgent_inputs(command: F) -> F:
    """The options of `--method edgent` alone."""
    options = [
        click.option(
            "--exit-after",
            "exit_layers",
            multiple=True,
            metavar="LAYER",
            help="edgent: an exit leaves behind this layer; repeat for more.",
        ),
        click.option(
            "--exit-share",
            "exit_shares",
            multiple=True,
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="edgent: an exit leaves where this share of the multiply-accumulates is done; "
            "repeat for more. Default: 0.15, 0.35 and 0.6.",
        ),
        click.option(
            "--latency",
            "limit_ms",
            metavar="MS",
            type=click.FloatRange(0, min_open=True),
            help="edgent: the latency required. Default: the fleet's deadline.",
        ),
        click.option(
            "--strategies",
            default=8,
            show_default=True,
            type=click.IntRange(1),
            help="edgent: how many ways to cut and exit are exported at most.",
        ),
        click.option(
            "--profiles",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="edgent: measured latencies of layers by kind of device, JSON; without them the "
            "paper's coefficients (a Pi 3 and a PC, Chainer) stand in.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


_DATA_HELP = (
    "An .npz (x_train, y_train, x_val, y_val, x_test, y_test, or x and y; FILE.npz#NAME takes the "
    "index NAME that the file has of itself), a folder of images per class, or digits, mnist, "
    "fashion_mnist, cifar10, cifar100."
)


@click.command()
@_inputs
@_ddnn_inputs
@_lcp_inputs
@_nonn_inputs
@_edgent_inputs
def plan(
    model: Path | None, data: str, fleet: Path, method: str, as_json: bool, **chosen: Any
) -> None:
    """Show who would get which piece, and what it costs, without writing anything."""
    from agent.protocol.units import format_bytes
    from exporter import pipeline

    with _progress() as progress:
        design, costs, loaded = pipeline.plan(
            model,
            data,
            fleet,
            method=method,
            options=_method_options(method, chosen),
            progress=progress,
        )
    rows = []
    for piece in design.pieces:
        device = loaded.device(piece.device)
        cost = next(c for c in costs[piece.device] if c.name == piece.name)
        rows.append(
            {
                "device": device.id,
                "kind": device.kind.value,
                "piece": piece.name,
                "about": piece.about,
                "parameters": cost.parameters,
                "macs": cost.macs,
                "weight_bytes": cost.weight_bytes,
                "file_bytes": cost.file_bytes,
                "peak_activation_bytes": cost.peak_activation_bytes,
                "message_bytes": piece.message_bytes,
                "origin": "estimated",
            }
        )
    if as_json:
        click.echo(json.dumps({"method": method, "pieces": rows}))
        return
    _print_table(
        ("device", "kind", "piece", "classes", "parameters", "MACs", "file", "tensors"),
        [
            (
                str(r["device"]),
                str(r["kind"]),
                str(r["piece"]),
                str(r["about"]),
                f"{r['parameters']:,}",
                f"{r['macs']:,}",
                format_bytes(int(str(r["file_bytes"]))),
                format_bytes(int(str(r["peak_activation_bytes"]))),
            )
            for r in rows
        ],
        "Estimated from the pruned networks; `shoal export` measures",
    )


def _targets(context: click.Context, option: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in TARGET_NAMES]:
        raise click.BadParameter(f"no {unknown[0]!r}; there are: {', '.join(TARGET_NAMES)}")
    return names


@click.command()
@_inputs
@_ddnn_inputs
@_lcp_inputs
@_nonn_inputs
@_edgent_inputs
@click.option(
    "-o",
    "--out",
    default="bundle",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The bundle folder; an earlier bundle there is replaced.",
)
@click.option("--float", "as_float", is_flag=True, help="Export float32 pieces instead of int8.")
@click.option(
    "--allow-drift",
    is_flag=True,
    help="Accept LiteRT pieces that differ from the reference kernels by more than 2 steps, if "
    "they are as near to the float model. The manifest and the report say which.",
)
@click.option(
    "--targets",
    default="tflm",
    show_default=True,
    metavar="NAME,...",
    callback=_targets,
    help=f"What microcontrollers' pieces are written as: {', '.join(TARGET_NAMES)}.",
)
def export(
    model: Path | None,
    data: str,
    fleet: Path,
    method: str,
    out: Path,
    as_float: bool,
    allow_drift: bool,
    targets: tuple[str, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Spread one inference over the fleet: write all that its devices need into a bundle.

    MODEL.keras is the trained network; --method ddnn trains its own and takes none.
    """
    from agent.protocol.fleet import load_fleet
    from agent.protocol.units import format_bytes
    from exporter import pipeline
    from exporter.report import budget_uses, percent_of_budget

    with _progress() as progress:
        manifest = pipeline.export(
            model,
            data,
            fleet,
            out,
            method=method,
            options=_method_options(method, chosen),
            dtype="float32" if as_float else "int8",
            allow_drift=allow_drift,
            targets=targets,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(manifest.model_dump(mode="json")))
        return
    devices = load_fleet(out / manifest.fleet.path)
    rows, uses = [], []
    for node in manifest.plan.strategies[0].nodes:
        entry = manifest.entry(node.piece) if node.piece else None
        piece = manifest.plan.piece(node.piece) if node.piece else None
        labels = (
            [manifest.plan.classes[c] for c in piece.answer.classes]
            if piece and piece.answer
            else []
        )
        rows.append(
            (
                node.device,
                node.piece or "-",
                ", ".join(labels) or (node.fusion.value if node.fusion else "-"),
                f"{entry.estimated.parameters:,}" if entry else "-",
                format_bytes(entry.model.size_bytes) if entry else "-",
                format_bytes(entry.arena_bytes) if entry and entry.arena_bytes else "-",
            )
        )
        for use in budget_uses(devices.device(node.device), entry) if entry else ():
            used = format_bytes(use.own + use.shared)
            total, share = format_bytes(use.budget), percent_of_budget(use.share)
            uses.append((node.device, use.what, used, total, share))
    _print_table(
        ("device", "piece", "classes or fusion", "parameters", "file", "arena"),
        rows,
        f"Plan {manifest.plan_id}: sizes and arenas measured",
    )
    _print_table(
        ("device", "budget", "used", "of", "share"),
        uses,
        "Budgets: files and arenas measured, the rest estimated",
    )
    for name, figure in sorted(manifest.figures.items()):
        if figure.unit == "share":
            click.echo(f"{name.replace('_', ' ')}: {figure.value * 100:.2f} % ({figure.origin})")
    click.echo(f"bundle: {out}\nreport: {out / 'report.html'}")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def report(bundle: Path, as_json: bool) -> None:
    """Draw a bundle's report.html anew and print its figures."""
    from agent.protocol.manifest import read_manifest
    from exporter.report import rewrite_report

    page = rewrite_report(bundle)
    manifest = read_manifest(bundle)
    if as_json:
        figures = {name: figure.model_dump() for name, figure in manifest.figures.items()}
        click.echo(json.dumps({"report": str(page), "figures": figures}))
        return
    _print_table(
        ("figure", "value", "unit", "origin", "note"),
        [
            (name, f"{figure.value:,.6g}", figure.unit, figure.origin, figure.note)
            for name, figure in sorted(manifest.figures.items())
        ],
        f"report: {page}",
    )


@click.group()
def cost() -> None:
    """Reckon what a method or a bundle costs: pure arithmetic, estimated."""


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic in some versions only
    """HEIGHTxWIDTH as two whole numbers."""

    name = "HxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        height, separator, width = str(value).partition("x")
        if not (separator and height.isdecimal() and width.isdecimal()):
            self.fail(f"{value!r} is not HEIGHTxWIDTH, for example 16x16", param, ctx)
        return int(height), int(width)


@cost.command()
@click.option("--filters", required=True, type=click.IntRange(1), help="Sent by each device.")
@click.option("--output", required=True, type=_Size(), help="Bits of one filter, such as 16x16.")
@click.option("--classes", required=True, type=click.IntRange(2))
@click.option(
    "--local-exit",
    required=True,
    type=click.FloatRange(0, 1),
    help="Share of the samples that the local exit answers.",
)
@click.option("--devices", default=1, show_default=True, type=click.IntRange(1))
@click.option("--edge-filters", type=click.IntRange(1), help="Sent by each edge, if there are any.")
@click.option("--edge-output", type=_Size(), help="Bits of one filter of an edge.")
@click.option(
    "--edge-exit",
    type=click.FloatRange(0, 1),
    help="Share of the samples reaching the edges that their exit answers.",
)
@click.option("--edges", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def ddnn(
    filters: int,
    output: tuple[int, int],
    classes: int,
    local_exit: float,
    devices: int,
    edge_filters: int | None,
    edge_output: tuple[int, int] | None,
    edge_exit: float | None,
    edges: int,
    as_json: bool,
) -> None:
    """Bytes that a DDNN's device sends per sample: equation (1), with edges too if given."""
    from exporter.cost import TierTraffic, bytes_per_sample, fleet_bytes_per_sample

    tiers = [TierTraffic(classes, filters, output[0] * output[1], local_exit, devices)]
    if (edge_filters, edge_output, edge_exit) != (None, None, None):
        if edge_filters is None or edge_output is None or edge_exit is None:
            raise click.UsageError(
                "--edge-filters, --edge-output and --edge-exit belong together: give all three"
            )
        positions = edge_output[0] * edge_output[1]
        tiers.append(TierTraffic(classes, edge_filters, positions, edge_exit, edges))
    each = [round(sent, 4) for sent in bytes_per_sample(tiers)]
    result = {"bytes_per_sample": each[0]}
    if len(each) > 1:
        result["edge_bytes_per_sample"] = each[1]
    if devices > 1 or len(each) > 1:
        result["fleet_bytes_per_sample"] = round(fleet_bytes_per_sample(tiers), 4)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name.replace('_', ' ')}: {value:.1f} B (estimated)")


@cost.command("bundle")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--platform",
    "named",
    multiple=True,
    metavar="DEVICE=PLATFORM",
    help="What a device is, where its kind does not say: a platform's name or a .yaml file.",
)
@click.option("--trigger", is_flag=True, help="Devices read their own sensors: no frame is sent.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def cost_bundle(bundle: Path, named: tuple[str, ...], trigger: bool, as_json: bool) -> None:
    """Latency, bytes and energy of a decision at each exit of a bundle, by walking its plan."""
    from agent.protocol.fleet import load_fleet
    from agent.protocol.manifest import read_manifest
    from agent.protocol.units import format_bytes
    from exporter.cost.bundle import bundle_cost

    if wrong := [item for item in named if "=" not in item]:
        raise click.UsageError(f"{wrong[0]!r} is not DEVICE=PLATFORM, for example eye-0=pi-4")
    manifest = read_manifest(bundle)
    fleet = load_fleet(bundle / manifest.fleet.path)
    platforms = dict(item.split("=", 1) for item in named)
    costs = bundle_cost(manifest, fleet, platforms=platforms, trigger=trigger)
    if as_json:
        exits = [
            {
                "tier": tier,
                "latency_ms": found.latency_s * 1e3,
                "bytes": found.bytes_sent,
                "joules": found.joules,
                "devices": {
                    name: {"busy_ms": device.busy_s * 1e3, "memory_bytes": device.resident_bytes}
                    for name, device in found.devices.items()
                },
            }
            for tier, found in costs.items()
        ]
        click.echo(json.dumps({"origin": "estimated", "exits": exits}))
        return
    for tier, found in costs.items():
        energy = "" if found.joules is None else f", {found.joules * 1e3:.0f} mJ of all devices"
        rows = [
            (
                name,
                f"{device.busy_s * 1e3:.2f}",
                format_bytes(round(device.resident_bytes)),
                format_bytes(round(device.sent_bytes)),
            )
            for name, device in found.devices.items()
        ]
        _print_table(
            ("device", "busy ms", "weights and tensors", "sends"),
            rows,
            f"Decided at tier {tier}: {found.latency_s * 1e3:.2f} ms, "
            f"{format_bytes(round(found.bytes_sent))} on the medium{energy} (estimated)",
        )


@click.group()
def counts() -> None:
    """Count the papers' networks, without building them: exact."""


@counts.command()
@click.option("--model", required=True, metavar="NAME", help="lenet, cifarnet, vgg16, ...")
@click.option("--split", default=1, show_default=True, type=click.IntRange(1), help="Branches.")
@click.option(
    "--fatten",
    default=0.0,
    show_default=True,
    metavar="PERCENT",
    type=click.FloatRange(0),
    help="How much wider each branch is than its share.",
)
@click.option("--classes", type=click.IntRange(2), help="Default: those of the paper's data.")
@click.option(
    "--merge",
    type=click.Choice(["sum", "concat"]),
    help="How branches are merged. Default: as the paper's counts have it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def lcp(
    model: str, split: int, fatten: float, classes: int | None, merge: str | None, as_json: bool
) -> None:
    """Parameters and multiply-accumulates of a network split into branches by LCP."""
    from agent.protocol.plan import Fusion
    from exporter.methods.lcp.counts import split_counts

    found = split_counts(
        model,
        split,
        fatten=fatten / 100,
        classes=classes,
        merge=None if merge is None else Fusion(merge),
    )
    told = found.as_json()
    if as_json:
        click.echo(json.dumps(told))
        return
    rows = [
        (
            f"{row['times']} x {row['name']}",
            row["op"],
            " x ".join(map(str, row["shape"])),
            f"{row['params']:,}",
            f"{row['macs']:,}",
        )
        for row in told["layers"]
    ]
    _print_table(
        ("layer", "what", "output", "parameters", "MACs"),
        rows,
        f"{model}, {split} branches: {found.params:,} parameters, {found.macs:,} MACs",
    )


def _method_options(method: str, chosen: dict[str, Any]) -> Any:
    options = {
        "snn": _options,
        "ddnn": _ddnn_options,
        "lcp": _lcp_options,
        "nonn": _nonn_options,
        "layerwise": _layerwise_options,
        "edgent": _edgent_options,
    }
    return options[method](chosen)


def _ddnn_options(chosen: dict[str, Any]) -> Any:
    from agent.protocol.plan import Fusion
    from exporter.methods.ddnn.exits import Bounds, Goal
    from exporter.methods.ddnn.options import DdnnOptions
    from exporter.methods.ddnn.train import AUTHORS_WEIGHTS, PAPER_WEIGHTS, TrainOptions

    return DdnnOptions(
        filters=() if chosen["raw"] else chosen["ddnn_filters"] or (4,),
        score_fusion=Fusion(chosen["score_fusion"]),
        feature_fusion=Fusion(chosen["feature_fusion"]),
        cloud=chosen["cloud"],
        training=TrainOptions(
            epochs=chosen["epochs"] or 100,
            weights=PAPER_WEIGHTS if chosen["loss"] == "paper" else AUTHORS_WEIGHTS,
            device_dropout=0.2 if chosen["device_dropout"] is None else chosen["device_dropout"],
            seed=chosen["seed"],
        ),
        exits=Bounds(
            goal=Goal(chosen["exits"]),
            max_bytes=chosen["max_bytes"],
            max_latency_ms=chosen["max_latency"],
            thresholds=chosen["exit_thresholds"] or None,
        ),
        seed=chosen["seed"],
    )


def _lcp_options(chosen: dict[str, Any]) -> Any:
    from agent.protocol.plan import Fusion
    from exporter.methods.lcp.options import LcpOptions
    from exporter.training import TrainOptions

    return LcpOptions(
        merge=None if chosen["merge"] == "auto" else Fusion(chosen["merge"]),
        unequal=chosen["unequal"],
        fatten=None if chosen["fatten"] is None else chosen["fatten"] / 100,
        task_error=chosen["task_error"],
        fresh=chosen["fresh"],
        teach=chosen["teach"],
        prune=chosen["prune"] / 100,
        fixed_point=chosen["fixed_point"],
        training=TrainOptions(
            epochs=chosen["epochs"] or 30,
            decay=1e-4,
            crop_pixels=chosen["shift"],
            flip=chosen["flip"],
            part_dropout=chosen["device_dropout"] or 0.0,
            seed=chosen["seed"],
        ),
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


def _nonn_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.nonn.communities import CommunityOptions
    from exporter.methods.nonn.loss import LossOptions
    from exporter.methods.nonn.options import NonnOptions
    from exporter.methods.nonn.students import Builder, dense_builder, wide_builder
    from exporter.training import TrainOptions

    kind = chosen["students"]
    if kind.startswith("wrn"):
        builder: Builder | None = wide_builder(int(kind.removeprefix("wrn")))
    else:
        builder = dense_builder if kind == "dense" else None
    dropout = chosen["device_dropout"]
    return NonnOptions(
        communities=CommunityOptions(seed=chosen["seed"]),
        loss=LossOptions(beta=chosen["beta"]),
        training=TrainOptions(
            epochs=chosen["epochs"] or 60,
            rate=chosen["rate"],
            crop_pixels=chosen["shift"],
            flip=chosen["flip"],
            part_dropout=0.2 if dropout is None else dropout,
            seed=chosen["seed"],
        ),
        builder=builder,
        ratio=chosen["ratio"],
        max_macs=chosen["max_macs"],
        max_energy_mj=chosen["max_energy"],
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


def _layerwise_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.layerwise.options import LayerwiseOptions

    return LayerwiseOptions()


def _edgent_options(chosen: dict[str, Any]) -> Any:
    from exporter.methods.edgent.options import EdgentOptions
    from exporter.methods.edgent.profile import load_profiles
    from exporter.training import TrainOptions

    given = chosen["exit_shares"]
    return EdgentOptions(
        exits=chosen["exit_layers"],
        shares=tuple(sorted(given)) if given else EdgentOptions().shares,
        training=TrainOptions(
            epochs=chosen["epochs"] or 20,
            decay=1e-4,
            crop_pixels=chosen["shift"],
            flip=chosen["flip"],
            seed=chosen["seed"],
        ),
        limit_ms=chosen["limit_ms"],
        strategies=chosen["strategies"],
        profiles=None if chosen["profiles"] is None else load_profiles(chosen["profiles"]),
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


def _options(chosen: dict[str, Any]) -> Any:
    from agent.protocol.plan import Fusion
    from exporter.methods.snn.compensate import CompensateOptions
    from exporter.methods.snn.distill import DistillOptions
    from exporter.methods.snn.options import QUICK_SEARCH, SnnOptions
    from exporter.methods.snn.prune import Criterion

    epochs = chosen["distill"]

    return SnnOptions(
        max_drop=chosen["max_drop"],
        keep=chosen["keep"],
        criterion=Criterion(chosen["criterion"]),
        quick=chosen["quick"],
        compensate=CompensateOptions(seed=chosen["seed"]) if chosen["compensate"] else None,
        distill=DistillOptions(epochs=epochs, seed=chosen["seed"]) if epochs else None,
        outcomes=chosen["outcomes"],
        fusion=None if chosen["fusion"] == "auto" else Fusion(chosen["fusion"]),
        partition=replace(
            QUICK_SEARCH,
            evaluated_at_least=1,
            evaluated_at_most=chosen["candidates"],
            seed=chosen["seed"],
        ),
        workers=chosen["workers"],
        dask_scheduler=chosen["dask"],
        cache=chosen["cache"],
        seed=chosen["seed"],
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on stderr; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        said: set[str] = set()

        def tell(what: str, done: int, total: int) -> None:
            if what not in said:
                said.add(what)
                print(f"{what} ...", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield draw


_NUMBERS = {"parameters", "MACs", "tensors", "file", "arena", "used", "of", "share"}
"""Columns that are aligned to the right."""


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in head:
        numeric = name in _NUMBERS
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    terminal = Console()
    console = Console(width=terminal.width if terminal.is_terminal else 160)
    console.print(title, style="italic", highlight=False, markup=False)
    console.print(table)
