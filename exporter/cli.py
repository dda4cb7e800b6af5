"""`shoal plan`, `export`, `report`, `cost`. Light to import: TensorFlow comes with the work."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from exporter.method_options import (
    AUTO,
    MethodCommand,
    fixed_settings,
    method_inputs,
    method_options,
)
from exporter.terminal import named_platforms, print_table

if TYPE_CHECKING:
    from agent.protocol.manifest import Manifest
    from exporter.methods.face import Progress

TARGET_NAMES = ("tflm", "c", "arduino", "esp-idf", "zephyr")


@click.command(cls=MethodCommand)
@method_inputs(AUTO)
@click.option(
    "--what-if",
    "edits",
    multiple=True,
    metavar="CHANGE",
    help="Answer for another fleet from the last search, training nothing: 'add 2 pi-4', "
    "'remove ID', 'link 1 Mbit/s'; repeat for more.",
)
@click.option(
    "--from",
    "bundle",
    type=click.Path(path_type=Path),
    help="A bundle made for an earlier fleet: says what of it --fleet can still use, and what "
    "must be redone.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="With --from: write the bundle that is left once pieces are moved.",
)
@click.option(
    "--report",
    "page",
    default="report.html",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where --method auto draws its page.",
)
@click.option(
    "--measured",
    multiple=True,
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    help="A bundle whose running fleet `shoal measure` measured: with --method auto that stands "
    "beside what is predicted of the same plan; repeat for more.",
)
def plan(
    model: Path | None,
    data: str | None,
    fleet: Path,
    method: str,
    edits: tuple[str, ...],
    bundle: Path | None,
    out: Path | None,
    page: Path,
    measured: tuple[Path, ...],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Compare all methods on a fleet and say which plan to take; or what one method would make.

    Nothing is written but the page and the cache; `shoal export --method auto` writes the bundle.
    """
    from exporter.planner.command import Asked, answer_what_if, plan_all, replan_bundle

    if (edits or bundle is not None) and (model is not None or data is not None):
        raise click.UsageError(
            "--what-if answers from the last search and --from from a bundle: leave the model and "
            "--data out"
        )
    if measured and (edits or bundle is not None or method != AUTO):
        raise click.UsageError("--measured goes with a search: a model and --data, --method auto")
    if edits:
        answer_what_if(edits, chosen["cache"], as_json=as_json)
        return
    if bundle is not None:
        replan_bundle(bundle, fleet, out, as_json=as_json)
        return
    if out is not None:
        raise click.UsageError("-o goes with --from; `shoal export` writes bundles")
    if data is None:
        raise click.UsageError("Missing option '--data'.")
    if method == AUTO:
        with _progress() as progress:
            asked = Asked(model, data, fleet, chosen, fixed_settings())
            plan_all(asked, page, progress, measured=measured, as_json=as_json)
        return
    _plan_one(model, data, fleet, method, chosen, as_json=as_json)


def _plan_one(
    model: Path | None,
    data: str,
    fleet: Path,
    method: str,
    chosen: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Show who would get which piece of one method's plan, and what it costs."""
    from agent.protocol.units import format_bytes
    from exporter import pipeline

    with _progress() as progress:
        design, costs, loaded = pipeline.plan(
            model,
            data,
            fleet,
            method=method,
            options=method_options(method, chosen),
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
    print_table(
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


@click.command(cls=MethodCommand)
@method_inputs("snn")
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
    "they are as near to the float model. The manifest and the report say which. --method auto "
    "does so where it must.",
)
@click.option(
    "--targets",
    default="tflm",
    show_default=True,
    metavar="NAME,...",
    callback=_targets,
    help=f"What microcontrollers' pieces are written as: {', '.join(TARGET_NAMES)}.",
)
@click.option(
    "--take",
    metavar="PLAN",
    help="With --method auto: not the best plan, but this one of those that `shoal plan` names, "
    "such as 'layerwise on eye-0 eye-1'; it is trained if it was not.",
)
def export(
    model: Path | None,
    data: str | None,
    fleet: Path,
    method: str,
    out: Path,
    as_float: bool,
    allow_drift: bool,
    targets: tuple[str, ...],
    take: str | None,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Spread one inference over the fleet: write all that its devices need into a bundle.

    MODEL.keras is the trained network; --method ddnn trains its own and takes none.
    """
    from exporter import pipeline

    if data is None:
        raise click.UsageError("Missing option '--data'.")
    if take is not None and method != AUTO:
        raise click.UsageError("--take names one of all plans: --method auto")
    dtype: Literal["int8", "float32"] = "float32" if as_float else "int8"
    with _progress() as progress:
        if method == AUTO:
            from exporter.planner.command import Asked, export_best, export_named

            write = export_best if take is None else partial(export_named, take)
            asked = Asked(model, data, fleet, chosen, fixed_settings())
            manifest, sentence = write(asked, out, progress, dtype=dtype, targets=targets)
            print(sentence, file=sys.stderr)
        else:
            manifest = pipeline.export(
                model,
                data,
                fleet,
                out,
                method=method,
                options=method_options(method, chosen),
                dtype=dtype,
                allow_drift=allow_drift,
                targets=targets,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(manifest.model_dump(mode="json")))
    else:
        _print_bundle(manifest, out)


def _print_bundle(manifest: Manifest, out: Path) -> None:
    """What each device runs, what that takes of its budget, and the accuracies."""
    from agent.protocol.fleet import load_fleet
    from agent.protocol.units import format_bytes
    from exporter.report import budget_uses, percent_of_budget

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
    print_table(
        ("device", "piece", "classes or fusion", "parameters", "file", "arena"),
        rows,
        f"Plan {manifest.plan_id}: sizes and arenas measured",
    )
    print_table(
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
@click.option(
    "--platform",
    "named",
    multiple=True,
    metavar="DEVICE=PLATFORM",
    help="What a device is, for what is predicted beside what `shoal measure` found: a "
    "platform's name or a .yaml file. By default its kind says.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def report(bundle: Path, named: tuple[str, ...], as_json: bool) -> None:
    """Draw a bundle's report.html anew and print its figures.

    Where `shoal measure` has measured its fleet, predictions stand beside what was measured.
    """
    from agent.protocol.fleet import load_fleet
    from agent.protocol.manifest import read_manifest
    from exporter.report import measured_beside, rewrite_report
    from exporter.report_measured import HEAD

    platforms = named_platforms(named)
    page = rewrite_report(bundle, platforms)
    manifest = read_manifest(bundle)
    beside = measured_beside(bundle, manifest, load_fleet(bundle / manifest.fleet.path), platforms)
    if as_json:
        figures = {name: figure.model_dump() for name, figure in manifest.figures.items()}
        told: dict[str, Any] = {"report": str(page), "figures": figures}
        if beside.tables or beside.note:
            told["measured"] = [
                {"about": text, "figures": [row.as_json() for row in rows]}
                for text, rows in beside.tables
            ]
            told["note"] = beside.note or None
        click.echo(json.dumps(told))
        return
    print_table(
        ("figure", "value", "unit", "origin", "note"),
        [
            (name, f"{figure.value:,.6g}", figure.unit, figure.origin, figure.note)
            for name, figure in sorted(manifest.figures.items())
        ],
        f"report: {page}",
    )
    for text, rows in beside.tables:
        print_table(HEAD, [row.row() for row in rows], f"Predicted and measured: {text}")
    if beside.note:
        click.echo(beside.note)


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
    from exporter.cost.bundle import bundle_cost, works_of_files

    platforms = named_platforms(named)
    manifest = read_manifest(bundle)
    fleet = load_fleet(bundle / manifest.fleet.path)
    works = works_of_files(bundle, manifest)
    costs = bundle_cost(manifest, fleet, platforms=platforms, trigger=trigger, works=works)
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
        print_table(
            ("device", "busy ms", "weights and tensors", "sends"),
            rows,
            f"Decided at tier {tier}: {found.latency_s * 1e3:.2f} ms, "
            f"{format_bytes(round(found.bytes_sent))} on the medium{energy} (estimated)",
        )


@cost.command("platform")
@click.argument("profiles", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kind", required=True, help="Which device of the profiles.")
@click.option("--base", required=True, metavar="PLATFORM", help="Whose memories and power it has.")
@click.option("--name", required=True, help="What the new platform is called.")
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="The file to write."
)
def cost_platform(profiles: Path, kind: str, base: str, name: str, out: Path) -> None:
    """Fit a platform to the layers that `shoal profile` timed on a device."""
    from exporter.cost.platform import load_platform, parse_platform
    from exporter.cost.profiled import platform_of_profile, platform_text
    from exporter.methods.edgent.profile import load_profiles

    platform = platform_of_profile(load_profiles(profiles).of(kind), load_platform(base), name)
    text = platform_text(platform)
    parse_platform(text, str(out))
    out.write_text(text, encoding="utf-8")
    click.echo(f"platform: {out}")


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
    print_table(
        ("layer", "what", "output", "parameters", "MACs"),
        rows,
        f"{model}, {split} branches: {found.params:,} parameters, {found.macs:,} MACs",
    )


READING = "read model and data"


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on stderr; plain lines where stderr is no terminal.

    Says at once that it reads: TensorFlow alone takes seconds to load.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        said: set[str] = set()

        def tell(what: str, done: int, total: int) -> None:
            if what not in said:
                said.add(what)
                print(f"{what} ...", file=sys.stderr, flush=True)

        tell(READING, 0, 1)
        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                if READING in tasks:
                    bars.update(tasks[READING], completed=1)
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        draw(READING, 0, 1)
        yield draw
