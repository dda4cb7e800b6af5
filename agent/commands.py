"""The subcommands that every device has. Each one parses, calls one public function, and prints.

Only click is imported here: a command imports what it needs when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import threading

    from agent.protocol.measured import Run, Spread
    from agent.protocol.messages import DeviceInfo

DEFAULT_BUNDLE = Path("bundle")
DEFAULT_FLEET = Path("fleet.yaml")

F = TypeVar("F", bound=Callable[..., Any])


def read_address(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, int] | None:
    """HOST:PORT, HOST, or [IPV6]:PORT as (host, port); port 1883 where none is given."""
    if value is None:
        return None
    if value.startswith("["):
        host, closed, rest = value[1:].partition("]")
        port = "?" if not closed or rest[:1] not in ("", ":") else rest[1:]
    elif value.count(":") > 1:
        host, port = value, ""
    else:
        host, _, port = value.partition(":")
    port = port or "1883"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.BadParameter(
            f"{value!r} is not HOST:PORT, for example 192.168.1.5:1883", ctx, param
        )
    return host, int(port)


FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)

bundle_option = click.option(
    "--bundle",
    type=FOLDER,
    default=DEFAULT_BUNDLE,
    envvar="SHOAL_BUNDLE",
    show_default=True,
    show_envvar=True,
    help="Folder that `shoal export` wrote.",
)
broker_option = click.option(
    "--broker",
    metavar="HOST[:PORT]",
    callback=read_address,
    help="MQTT broker instead of the fleet file's.",
)
deadline_option = click.option(
    "--deadline",
    "deadline_ms",
    type=click.IntRange(min=1),
    metavar="MS",
    help="Milliseconds that the fleet has; by default the fleet file's deadline.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def target_options(command: F) -> F:
    """--bundle, --fleet and --broker of a command that talks to a fleet."""
    options = [
        click.option(
            "--bundle",
            type=FOLDER,
            envvar="SHOAL_BUNDLE",
            show_envvar=True,
            help=f"Folder that `shoal export` wrote; by default {DEFAULT_BUNDLE}/ if it is there.",
        ),
        click.option(
            "--fleet",
            "fleet_file",
            type=FILE,
            help=f"Fleet file instead of the bundle's; by default {DEFAULT_FLEET} "
            "where there is no bundle.",
        ),
        broker_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _sources(bundle: Path | None, fleet_file: Path | None) -> tuple[Path | None, Path | None]:
    """The bundle and fleet file that are meant: what is named, else what lies here."""
    if bundle is None and fleet_file is None:
        if DEFAULT_BUNDLE.is_dir():
            return DEFAULT_BUNDLE, None
        if DEFAULT_FLEET.is_file():
            return None, DEFAULT_FLEET
    return bundle, fleet_file


def _quiet() -> None:
    """Keep the link's log lines off the terminal: the command shows the same faults itself."""
    import logging

    logging.getLogger("agent").addHandler(logging.NullHandler())


@click.command()
@click.argument("fleet", type=FILE, default=DEFAULT_FLEET)
@json_option
def check(fleet: Path, as_json: bool) -> None:
    """Check a fleet file: every mistake, or devices and budgets."""
    from agent.console import print_json, print_table, talk
    from agent.protocol.fleet import load_fleet
    from agent.protocol.units import format_bytes
    from agent.sensor import locate

    found = load_fleet(fleet)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    columns = ["device", "kind", "tier", "runtime", "memory", "flash", "link", "role"]
    if any(device.sensor is not None for device in found.devices):
        columns.insert(-1, "sensor")
    print_table(
        columns,
        [
            {
                "device": device.id,
                "kind": device.kind.value,
                "tier": device.tier,
                "runtime": device.runtime.value,
                "memory": format_bytes(device.memory_bytes),
                "flash": None if device.flash_bytes is None else format_bytes(device.flash_bytes),
                "link": f"{found.link_of(device).rate_bits_per_s / 1e6:g} Mbit/s, "
                f"{found.link_of(device).latency_ms:g} ms",
                "sensor": None if device.sensor is None else device.sensor.text(),
                "role": "aggregator" if device.id == found.aggregator else None,
            }
            for device in found.devices
        ],
        right=("tier", "memory", "flash"),
    )
    for device in found.devices:
        path = None if device.sensor is None else device.sensor.array or device.sensor.folder
        if path is not None and not locate(path, fleet.parent).exists():
            talk(f"{device.id}: {path} is not on this machine; it must be where {device.id} runs")
    talk(
        f"{fleet}: fleet {found.fleet!r}, {len(found.devices)} devices, broker "
        f"{found.broker.host}:{found.broker.port}, deadline {found.deadline_ms:g} ms: no mistakes"
    )


@click.command()
@click.option("--device", required=True, help="Id of this device in the fleet file.")
@bundle_option
@broker_option
@json_option
def run(device: str, bundle: Path, broker: tuple[str, int] | None, as_json: bool) -> None:
    """Run one device's part of a bundle's plan, until stopped.

    SIGTERM ends it with a goodbye to the fleet and exit code 0, Ctrl-C with 130.
    """
    from agent.device import run_device
    from agent.gateway import run_serial_device
    from agent.target import open_target

    target = open_target(bundle, None, broker)
    known = {each.id: each for each in target.fleet.devices}
    serial = device in known and (known[device].emulated or known[device].serial is not None)
    (run_serial_device if serial else run_device)(
        bundle,
        device,
        target.broker,
        stop=_until_stopped(),
        on_ready=lambda info: _announce(info, str(target.broker), as_json),
    )


def _until_stopped() -> threading.Event:
    """Log to the terminal; the event is set by SIGTERM."""
    import logging
    import signal
    import threading

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return stop


def _announce(info: DeviceInfo, broker: str, as_json: bool) -> None:
    """Say that a device is online, and what it runs."""
    from agent.console import print_json, talk

    if as_json:
        print_json({"broker": broker, **info.model_dump(mode="json")})
        return
    stands_in = " (simulated)" if info.simulated else ""
    talk(
        f"{info.device} is online at {broker}: runs {', '.join(info.nodes)} on {info.runtime}"
        + stands_in
    )


@click.command()
@click.option("--device", required=True, help="Id of the device whose serial ports these are.")
@bundle_option
@broker_option
@json_option
def gateway(device: str, bundle: Path, broker: tuple[str, int] | None, as_json: bool) -> None:
    """Speak for the microcontrollers on this machine's serial ports, until stopped."""
    from agent.gateway import run_gateway
    from agent.target import open_target

    target = open_target(bundle, None, broker)
    run_gateway(
        bundle,
        device,
        target.broker,
        stop=_until_stopped(),
        on_ready=lambda info: _announce(info, str(target.broker), as_json),
    )


@click.command()
@bundle_option
@broker_option
@click.option("--private-broker", is_flag=True, help="Start a broker of our own on a free port.")
@click.option(
    "--timeout", "timeout_s", type=float, default=60.0, show_default=True,
    help="Seconds until every device must be online.",
)  # fmt: skip
@json_option
def up(
    bundle: Path,
    broker: tuple[str, int] | None,
    private_broker: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Run every device of a bundle on this machine, until Ctrl-C.

    Each device is a process. Starts a broker too where none runs at the fleet file's address. A
    device that crashes is started again; one that ends with a mistake in its input is reported.
    """
    import signal
    import threading

    from agent.console import print_json, talk
    from agent.up import FleetProcesses

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    fleet = FleetProcesses(
        bundle,
        broker=broker,
        private_broker=private_broker,
        on_line=lambda device, line: talk(f"[{device}] {line}"),
    )
    with fleet:
        if fleet.broker is not None:
            talk(f"started {fleet.broker.kind} on {fleet.broker.host}:{fleet.broker.port}")
            if fleet.broker.notice is not None:
                talk(fleet.broker.notice)
        rows = fleet.describe(fleet.wait_ready(timeout_s))
        if as_json:
            print_json({"broker": str(fleet.target.broker), "devices": rows})
        else:
            _print_devices(rows)
            for device in fleet.idle:
                talk(f"{device.id} has no part in this plan: not started")
            talk(f"fleet {fleet.target.fleet.fleet!r} is up at {fleet.target.broker}; Ctrl-C stops")
        last = None
        for ended, restart_s in fleet.supervise(threading.Event()):
            last = ended
            again = "not started again" if restart_s is None else f"again in {restart_s:g} s"
            if as_json:
                print_json({"ended": ended.device, "status": ended.status, "again_s": restart_s})
            talk(f"{ended.text()}\n  {again}")
    if last is not None:
        talk("no device runs any more")
        raise SystemExit(int(last.exit_code))


def _print_devices(rows: list[dict[str, Any]]) -> None:
    from agent.console import print_table

    shown = [
        row | {"nodes": ", ".join(row["nodes"]), "stands in": row["simulates"] or None}
        for row in rows
    ]
    columns = ("device", "kind", "tier", "pid", "runtime", "nodes", "stands in")
    print_table(columns, shown, right=("tier", "pid"))


NOW = "now"


def read_trigger(ctx: click.Context, param: click.Parameter, value: str | None) -> str | int | None:
    """A sample's number, NOW where none is given, None without the option."""
    if value is None or value == NOW:
        return value
    if not value.isdecimal() or int(value) >= 2**32:
        raise click.BadParameter(f"{value!r} is not the number of a sample, from 0", ctx, param)
    return int(value)


@click.command()
@click.argument("frame", metavar="[INPUT]", type=FILE, required=False)
@bundle_option
@broker_option
@click.option("--index", type=click.IntRange(min=0), help="Which frame of a file with several.")
@click.option(
    "--trigger",
    metavar="[SAMPLE]",
    is_flag=False,
    flag_value=NOW,
    callback=read_trigger,
    help="Send no frame: every device reads its own sensor; SAMPLE says what of a recording.",
)
@deadline_option
@json_option
def infer(
    frame: Path | None,
    bundle: Path,
    broker: tuple[str, int] | None,
    index: int | None,
    trigger: str | int | None,
    deadline_ms: int | None,
    as_json: bool,
) -> None:
    """Send a frame to the fleet, or --trigger its sensors, and print what it decides.

    INPUT is a .npy or .npz file, or an image.
    """
    if (frame is None) == (trigger is None):
        raise click.UsageError("give either INPUT or --trigger")
    if index is not None and frame is None:
        raise click.UsageError("--index is for INPUT; name the sample: --trigger SAMPLE")
    from agent.ask import Asker, check_sensors
    from agent.console import print_json, talk
    from agent.frame_file import read_frame
    from agent.monitor.events import decision_label, printable
    from agent.target import open_target
    from agent.traffic import totals

    _quiet()
    target = open_target(bundle, None, broker)
    assert target.manifest is not None
    values = None
    if frame is None:
        check_sensors(target.manifest, target.fleet)
    else:
        values = read_frame(frame, target.manifest.frame, index)
    sample = trigger if isinstance(trigger, int) else None
    with Asker(target.manifest, target.fleet, target.broker, measure=True) as asker:
        pending = asker.submit(values, sample=sample, deadline_ms=deadline_ms)
        decision = pending.result()
        traffic = totals(pending.traffic)
    if as_json:
        fields = decision.model_dump(mode="json")
        fields |= {"round_trip_ms": round(pending.round_trip_ms, 3), "traffic": traffic}
        print_json(fields)
        return
    click.echo(printable(decision_label(decision)))
    latency = decision.latency
    entropies = ", ".join(f"{node} {value:.3f}" for node, value in decision.entropies.items())
    lines = [
        f"entropy {decision.entropy:.3f}, tier {decision.tier}, strategy {decision.strategy}",
        f"answered: {', '.join(decision.contributors) or 'nobody'}",
        f"entropies: {entropies or 'none'}",
        f"{pending.round_trip_ms:.1f} ms; at the aggregator {latency.total_ms:.1f} ms: queue "
        f"{latency.queue_ms:.1f}, inference {latency.inference_ms:.1f}, wire "
        f"{latency.wire_ms:.1f}, fusion {latency.fusion_ms:.1f}; "
        f"{decision.bytes_received} bytes received",
        f"between all nodes {traffic['payload_bytes']} bytes ({traffic['content_bytes']} of "
        f"content), request {traffic['request_bytes']} bytes",
    ]
    if decision.blank:
        lines.insert(1, f"saw nothing: {', '.join(decision.blank)}")
    if decision.missing:
        lines.insert(1, f"missing: {', '.join(decision.missing)}")
    for line in lines:
        talk(printable(line))


@click.command()
@click.argument("data", metavar="[DATA]", required=False)
@bundle_option
@broker_option
@click.option(
    "--requests",
    default=100,
    show_default=True,
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="How many, one after the other, evenly over the samples.",
)
@click.option("--trigger", is_flag=True, help="Send no frames: every device reads its own sensor.")
@deadline_option
@json_option
def measure(
    data: str | None,
    bundle: Path,
    broker: tuple[str, int] | None,
    requests: int,
    trigger: bool,
    deadline_ms: int | None,
    as_json: bool,
) -> None:
    """Ask a running fleet many times: latency, bytes, accuracy, memory; kept in the bundle.

    DATA is the .npz file that the bundle was exported from (its test samples are taken), or a .npy
    file of frames. `shoal report` then shows predictions beside what is measured here.
    """
    if data is None and not trigger:
        raise click.UsageError("give DATA, or --trigger")
    from agent.console import print_json, talk
    from agent.measure import measure as measured
    from agent.measure import read_samples
    from agent.protocol.measured import keep_run
    from agent.target import open_target

    _quiet()
    target = open_target(bundle, None, broker)
    assert target.manifest is not None
    samples = read_samples(data, target.manifest, target.fleet, requests, trigger=trigger)
    talk(f"asking {requests} times, then hearing what the agents hold ...")
    run = measured(target.manifest, target.fleet, target.broker, samples, deadline_ms=deadline_ms)
    path = keep_run(bundle, run)
    if as_json:
        print_json(run.model_dump(mode="json"))
    else:
        _print_run(run)
        talk(f"kept in {path}; predictions beside it: shoal report {bundle}")


def _print_run(run: Run) -> None:
    """The tables of what was measured."""
    from agent.console import print_table
    from agent.protocol.units import format_bytes

    def spread(latency: Spread) -> dict[str, str]:
        return {
            "p50": f"{latency.p50_ms:.2f} ms",
            "mean": f"{latency.mean_ms:.2f} ms",
            "p90": f"{latency.p90_ms:.2f} ms",
            "p99": f"{latency.p99_ms:.2f} ms",
        }

    where = "all of it on one machine" if run.one_machine else f"broker {run.broker}"
    click.echo(f"Measured by {run.machine}, {where}, on {run.samples}:")
    doubts = f"{run.incomplete} without some node, {run.unknown} don't know"
    click.echo(f"  decisions  {run.decisions} of {run.requests} requests ({doubts})")
    if run.accuracy is not None:
        click.echo(
            f"  accuracy   {run.accuracy * 100:.2f} %, {run.right} of {run.labelled}"
            + ("" if run.held_out else "; training may have seen some")
        )
    print_table(
        ("decided by", "decisions", "p50", "mean", "p90", "p99"),
        [
            {
                "decided by": f"{way.strategy}, tier {way.tier}",
                "decisions": way.decisions,
                **spread(way.latency),
            }
            for way in run.ways
        ],
        right=("decisions", "p50", "mean", "p90", "p99"),
        title="From a request to its decision",
    )
    rows = {
        agent.device: {
            "device": agent.device,
            "runtime": agent.runtime,
            "stands in": "yes" if agent.simulated else "no",
            "memory": None if agent.memory_bytes is None else format_bytes(agent.memory_bytes),
        }
        for agent in run.agents
    }
    for device in dict.fromkeys(row.device for way in run.ways for row in way.sent):
        own = [(way.decisions, row) for way in run.ways for row in way.sent if row.device == device]
        kinds: dict[str, float] = {}
        for decisions, row in own:
            share = row.payload_bytes * decisions / run.decisions
            kinds[row.kind] = kinds.get(row.kind, 0.0) + share
        name = "(who asks)" if device is None else device
        rows.setdefault(name, {"device": name})["sends a decision"] = ", ".join(
            f"{kind} {format_bytes(round(size))}" for kind, size in kinds.items()
        )
    print_table(
        ("device", "runtime", "stands in", "sends a decision", "memory"),
        list(rows.values()),
        right=("memory",),
        title="Agents: payload they publish, memory of their processes",
    )


@click.command()
@target_options
@click.option("--once", is_flag=True, help="Print what is known now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line an event.")
def monitor(
    bundle: Path | None,
    fleet_file: Path | None,
    broker: tuple[str, int] | None,
    once: bool,
    as_json: bool,
) -> None:
    """Watch a fleet: devices, rates, decisions, who is missing."""
    import time

    from agent.console import console, print_json
    from agent.monitor.events import as_json as event_as_json
    from agent.monitor.state import apply_all, initial, rates_from, snapshot
    from agent.monitor.view import render
    from agent.monitor.watch import Watcher
    from agent.target import open_target

    _quiet()
    target = open_target(*_sources(bundle, fleet_file), broker)
    state = initial(target.fleet, target.names, time.time())
    with Watcher(target) as watcher:
        retained = watcher.take_retained()
        state = rates_from(apply_all(retained, state), time.time())
        if once:
            now_s = time.time()
            if as_json:
                print_json(snapshot(state, now_s))
            else:
                console().print(render(state, now_s))
        elif as_json:
            events = retained
            while True:
                for event in events:
                    print_json(event_as_json(event, target.names))
                events = watcher.take(1.0)
        else:
            _watch_live(watcher, state)


def _watch_live(watcher: Any, state: Any) -> None:
    import time

    from rich.live import Live

    from agent.console import console
    from agent.monitor.state import apply_all
    from agent.monitor.view import render

    terminal = console()
    frame_s = 0.25
    with Live(render(state, time.time()), console=terminal, auto_refresh=False) as live:
        next_s = time.monotonic()
        while True:
            state = apply_all(watcher.take(max(0.0, next_s - time.monotonic())), state)
            if time.monotonic() >= next_s:
                live.update(render(state, time.time()), refresh=True)
                next_s = time.monotonic() + frame_s


@click.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--runtime",
    default="litert",
    show_default=True,
    type=click.Choice(["litert", "tflite-runtime", "tflite-micro"]),
    help="What runs them; tflite-micro is a stand-in here, and slow.",
)
@click.option("--rounds", default=40, show_default=True, type=click.IntRange(1), help="Runs each.")
@click.option("-o", "--out", type=FILE, help="Write the JSON there; else it is printed.")
def time(folder: Path, runtime: str, rounds: int, out: Path | None) -> None:
    """Time every .tflite of a folder on this machine, for `shoal profile --timings`."""
    from agent.console import talk
    from agent.protocol.fleet import Runtime
    from agent.timing import time_folder

    text = time_folder(folder, runtime=Runtime(runtime), rounds=rounds).model_dump_json(indent=1)
    if out is None:
        click.echo(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    talk(f"{out}: timed; now: shoal profile --timings {out}")


@click.command()
@target_options
@click.option("--count", type=click.IntRange(min=1), help="End after this many messages.")
@click.option("--values", is_flag=True, help="With --json: tensors with their values.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line a message.")
def sub(
    bundle: Path | None,
    fleet_file: Path | None,
    broker: tuple[str, int] | None,
    count: int | None,
    values: bool,
    as_json: bool,
) -> None:
    """Print every message of a fleet, the binary ones decoded."""
    import time

    from agent.console import print_json, talk
    from agent.monitor.events import Connection, as_text
    from agent.monitor.events import as_json as event_as_json
    from agent.monitor.watch import Watcher
    from agent.target import open_target

    _quiet()
    target = open_target(*_sources(bundle, fleet_file), broker)
    left = count
    with Watcher(target) as watcher:
        dropped = 0
        while left is None or left > 0:
            for event in watcher.take(1.0)[:left]:
                if isinstance(event.content, Connection):
                    talk(event.content.text)
                    continue
                if as_json:
                    print_json(event_as_json(event, target.names, values=values))
                else:
                    clock = time.strftime("%H:%M:%S", time.localtime(event.at_s))
                    click.echo(
                        f"{clock}.{int(event.at_s * 1e3) % 1000:03d} {as_text(event, target.names)}"
                    )
                left = None if left is None else left - 1
            if watcher.dropped > dropped:
                dropped = watcher.dropped
                talk(f"{dropped} messages came too fast and are not shown")


@click.command()
@target_options
@json_option
def doctor(
    bundle: Path | None, fleet_file: Path | None, broker: tuple[str, int] | None, as_json: bool
) -> None:
    """Check machine, bundle and broker; name the next command."""
    from agent.console import print_finding, print_json
    from agent.doctor import examine, worst

    _quiet()
    findings = []
    for finding in examine(*_sources(bundle, fleet_file), broker):
        findings.append(finding)
        if not as_json:
            print_finding(finding.level.value, finding.check, finding.text, finding.hint)
    if as_json:
        print_json({"findings": [f.as_json() for f in findings], "exit_code": worst(findings)})
    raise SystemExit(int(worst(findings)))
