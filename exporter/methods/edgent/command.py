"""`shoal profile`: latencies of layers on a kind of device, as data that `shoal export` reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.protocol.errors import DataError
from exporter.terminal import print_table

if TYPE_CHECKING:
    from exporter.methods.edgent.profile import LatencyProfile

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.option("--device", help="Id of a device in the fleet file: its kind is what is profiled.")
@click.option(
    "--fleet", type=FILE, default=Path("fleet.yaml"), show_default=True, help="The fleet file."
)
@click.option(
    "-o",
    "--out",
    type=FILE,
    default=Path("profiles.json"),
    show_default=True,
    help="Profiles; what is in the file already is kept, the same kind fitted on all its layers.",
)
@click.option("--model", type=FILE, help="A .keras model whose own layers are measured as well.")
@click.option(
    "--layers",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep the models of one layer here; without --device that is all that is done.",
)
@click.option(
    "--timings",
    type=FILE,
    metavar="FILE",
    help="What `shoal time FOLDER` wrote on the device, instead of measuring here.",
)
@click.option(
    "--merge",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="Take in these profiles too; repeat for more.",
)
@click.option(
    "--target", default="m4", show_default=True, help="Core of a microcontroller, in QEMU."
)
@click.option("--clock", default="168 MHz", show_default=True, help="Of the microcontroller.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def profile(
    device: str | None,
    fleet: Path,
    out: Path,
    model: Path | None,
    layers: Path | None,
    timings: Path | None,
    merge: tuple[Path, ...],
    target: str,
    clock: str,
    as_json: bool,
) -> None:
    """Measure how long layers take on a kind of device, and fit what `shoal export` predicts by.

    Models of one layer each run through the device's own TFLite runtime: here, or by `shoal time`
    on the device. For a microcontroller the instructions of its C are counted in QEMU.
    """
    if device is None and (layers is None or timings is not None):
        raise click.UsageError("give --device, or --layers FOLDER to write the models alone")
    from exporter.methods.edgent import profile as profiles
    from exporter.methods.edgent.layer_models import INDEX

    with ExitStack() as stack:
        progress = _teller()
        folder = layers or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        kept = [profiles.load_profiles(path) for path in merge]
        if not (folder / INDEX).exists():
            if timings is not None:
                raise DataError(
                    f"{folder}: not the models that were timed",
                    "name the folder that shoal profile wrote: --layers FOLDER",
                )
            _write(folder, model, progress)
        elif model is not None:
            raise DataError(f"{folder}: holds models already", "name another folder: --layers")
        if device is None:
            click.echo(f"{folder}: copy it to the device, there run: shoal time {folder.name} -o t")
            return
        found = _measured(device, fleet, folder, timings, target, clock, progress)
    known = [profiles.load_profiles(out)] if out.exists() else []
    together = profiles.LatencyProfiles(profiles=())
    for more in (*known, *kept, profiles.LatencyProfiles(profiles=(found,))):
        together = profiles.merge(together, more)
    profiles.save_profiles(together, out)
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json")))
        return
    _print(found)
    click.echo(f"{out}: profiles of {', '.join(x.device_kind for x in together.profiles)}")


def _write(folder: Path, model: Path | None, progress: Any) -> None:
    from itertools import chain

    from exporter import pipeline
    from exporter.methods.edgent.layer_models import grid, own_layers, write_models
    from exporter.quantize.native_stderr import start_tensorflow

    start_tensorflow()
    own = () if model is None else own_layers(pipeline.load_model(model, several_exits=True))
    write_models(chain(grid(), own), folder, progress)


def _measured(
    device: str,
    fleet: Path,
    folder: Path,
    timings: Path | None,
    target: str,
    clock: str,
    progress: Any,
) -> LatencyProfile:
    import platform

    from agent.protocol.fleet import Runtime, load_fleet
    from exporter.methods.edgent.layer_models import read_index
    from exporter.methods.edgent.measure import (
        count_here,
        profile_of,
        read_timings,
        time_here,
    )

    found = load_fleet(fleet).device(device)
    if timings is not None:
        times = read_timings(timings)
    elif found.runtime is Runtime.TFLITE_MICRO:
        times = count_here(folder, target, _hertz(clock), progress)
    else:
        progress("time them", 0, 1)
        times = time_here(folder, found.runtime.value)
        if found.kind.value.startswith("pi-") and platform.machine() not in ("aarch64", "armv7l"):
            click.echo(
                f"{device} is a {found.kind.value}: this {platform.machine()} machine stands in "
                "for it. For its own times run there: shoal time",
                err=True,
            )
    for name, reason in times.left_out.items():
        click.echo(f"left out {name}: {reason}", err=True)
    return profile_of(found.kind.value, read_index(folder), times)


def _hertz(text: str) -> float:
    number, _, unit = text.strip().partition(" ")
    scale = {"MHz": 1e6, "GHz": 1e9, "kHz": 1e3, "Hz": 1.0}.get(unit.strip())
    try:
        hertz = float(number) * (scale or 0.0)
    except ValueError:
        hertz = 0.0
    if not hertz > 0:
        raise click.UsageError(f"--clock {text!r} is no frequency, for example '168 MHz'")
    return hertz


def _teller() -> Callable[[str, int, int], None]:
    """Says on stderr what begins, once."""
    said: set[str] = set()

    def tell(what: str, done: int, total: int) -> None:
        if what not in said:
            said.add(what)
            click.echo(f"{what} ...", err=True)

    return tell


def _print(found: LatencyProfile) -> None:
    rows = [
        (
            layer.kind,
            str(layer.samples),
            " + ".join(
                f"{value * 1e6:.3g} ns x {term}"
                for term, value in zip(layer.terms, layer.coefficients_ms, strict=True)
                if value
            )
            or "-",
            f"{layer.intercept_ms * 1e3:.1f} us",
            "-" if layer.r2 is None else f"{layer.r2:.3f}",
            "-" if layer.error is None else f"{layer.error * 100:.0f} %",
        )
        for layer in found.layers
    ]
    title = f"{found.device_kind}: {found.source} ({found.machine})"
    print_table(("layer", "samples", "fitted", "and", "R2", "error"), rows, title)
    click.echo(
        "R2 and median error are of layers that a fit has not seen; running any model takes "
        f"{found.piece_ms * 1e3:.0f} us"
    )
