"""The terminal view of a fleet's state. It reads the state and nothing else."""

from __future__ import annotations

import time

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from agent.protocol.messages import Status
from agent.protocol.units import format_bytes

from .events import decision_label, printable, rate_text
from .state import DeviceState, FleetState, SeenDecision

_STYLES = {Status.ONLINE: "green", Status.UPDATING: "yellow", Status.OFFLINE: "red"}


def _text(content: str, style: str = "") -> Text:
    return Text(printable(content), style)


def render(state: FleetState, now_s: float) -> Group:
    """What the terminal shows: a headline, the devices, the last decisions, what is wrong.

    Args:
        state: The fleet's state.
        now_s: Seconds since 1970, for the rates.
    """
    parts: list[Text | Table] = [_headline(state, now_s), _devices(state, now_s)]
    parts.append(_decisions(state) if state.decisions else _text("no decision yet", "dim"))
    if state.choices.told:
        parts.append(_choices(state))
    if state.last_rejected is not None:
        parts.append(_text(f"{state.rejected} rejected; last: {state.last_rejected}", "yellow"))
    if state.problem is not None:
        parts.append(_text(state.problem, "bold red"))
    return Group(*parts)


def _headline(state: FleetState, now_s: float) -> Text:
    online = sum(device.status is Status.ONLINE for device in state.devices.values())
    facts = [
        f"{online} of {len(state.devices)} devices online",
        f"{state.messages.per_second(now_s):.1f} messages/s",
        f"{format_bytes(round(state.payload_bytes.per_second(now_s)))}/s",
        f"{state.requests} requests",
        f"{state.decided} decisions",
    ]
    if state.unknown:
        facts.append(f"{state.unknown} don't know")
    if state.incomplete:
        facts.append(f"{state.incomplete} with someone missing")
    plan = f" plan {state.names.plan}" if state.names.plan else ""
    return Text.assemble((f"{state.fleet}{plan}", "bold"), "  " + " · ".join(facts))


def _devices(state: FleetState, now_s: float) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("device", "kind", "tier", "state", "runs"):
        table.add_column(column, no_wrap=column != "runs")
    for column in ("msg/s", "parts", "missed", "inference", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("last answer")
    for device in state.devices.values():
        stats = device.stats
        table.add_row(
            _text(device.id),
            device.kind or _text("not in the fleet file", "yellow"),
            "-" if device.tier is None else str(device.tier),
            _status(device),
            _runs(device, state),
            f"{device.rate.per_second(now_s):.1f}",
            str(device.parts),
            _text(str(device.missed), "yellow" if device.missed else ""),
            "-" if stats is None else f"{stats.inference_ms_p50:.2f} ms",
            "-" if stats is None else format_bytes(stats.memory_bytes),
            _last_answer(device, state),
        )
    return table


def _status(device: DeviceState) -> Text:
    if device.status is None:
        return _text("never seen", "yellow")
    return _text(device.status.value, _STYLES[device.status])


def _runs(device: DeviceState, state: FleetState) -> Text:
    info = device.info
    if info is None:
        return _text("-")
    text = _text(f"{', '.join(info.nodes) or 'no node'} on {info.runtime}")
    if info.simulated:
        text.append(" (simulated)", "cyan")
    if state.names.plan and info.plan != state.names.plan:
        text.append(f" other plan {info.plan}", "bold red")
    return text


def _last_answer(device: DeviceState, state: FleetState) -> Text:
    answer = device.last_answer
    if answer is None:
        return _text("-")
    if not answer.known:
        return _text("don't know", "dim")
    label = state.names.label(answer.header, answer.class_index)
    return _text(f"{label!r} {answer.entropy:.3f}")


def _choices(state: FleetState) -> Table:
    """What was picked for the last requests; above it the bandwidth and how many were late."""
    choices = state.choices
    late = f"{choices.late} of {choices.told} late"
    title = Text.assemble(
        ("link ", "bold"),
        rate_text(choices.last[0].bits_per_s),
        " · ",
        (late, "red" if choices.late else ""),
        f" · {choices.instead} answered by another strategy" if choices.instead else "",
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in ("strategy", "answered by", "link", "took", "required", ""):
        right = column in ("link", "took", "required")
        table.add_column(column, justify="right" if right else "left")
    for choice in choices.last:
        took = "-" if choice.round_trip_ms is None else f"{choice.round_trip_ms:.0f} ms"
        other = choice.answered != choice.strategy
        table.add_row(
            _text(choice.strategy),
            _text(choice.answered or "nobody", "yellow" if other else "dim"),
            rate_text(choice.bits_per_s),
            took,
            f"{choice.limit_ms:.0f} ms",
            Text("late", "red") if choice.late else Text("in time", "dim"),
        )
    return table


def _decisions(state: FleetState) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("time", "decision", "entropy", "tier", "latency", "entropies", "missing"):
        right = column in ("entropy", "tier", "latency")
        table.add_column(column, justify="right" if right else "left")
    for seen in state.decisions:
        table.add_row(*_decision_cells(seen))
    return table


def _decision_cells(seen: SeenDecision) -> list[Text]:
    decision = seen.decision
    entropies = "  ".join(f"{node} {value:.2f}" for node, value in decision.entropies.items())
    return [
        _text(time.strftime("%H:%M:%S", time.localtime(seen.at_s))),
        _text(decision_label(decision), "" if decision.label is None else "bold"),
        _text(f"{decision.entropy:.3f}"),
        _text(str(decision.tier)),
        _text(f"{decision.latency.total_ms:.1f} ms"),
        _text(entropies or "-"),
        _text(", ".join(decision.missing) or "-", "yellow" if decision.missing else ""),
    ]
