"""Edgent: how fast plans are searched, how change points are found, what replayed 4G links give.

python -m benchmarks.edgent [--json] [--keep]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from agent.adapt import ChangePoints, Chooser, bandwidth_states
from agent.protocol.adaptation import CostTable, configuration_map, reward
from benchmarks import edgent_alexnet, edgent_live
from benchmarks.datasets import SHARED
from benchmarks.record import BRIEF, HEADER, Row, circumstances, load, machine_line, report

NAME = "edgent"
PROBE_BITS = 8_000
BY: tuple[Literal["state", "expected"], ...] = ("state", "expected")


@dataclass(frozen=True)
class Setting:
    """One way to replay the logs.

    Attributes:
        scale: Of the logged bandwidths; the paper brings 0..95 Mbit/s to 0..10.
        link_ms: What one message takes however small it is.
        limit_ms: The latency required.
        period_s: Between requests.
        bytes_per_element: Of frames, intermediate tensors and scores.
    """

    name: str
    scale: float
    link_ms: float
    limit_ms: float
    period_s: float
    bytes_per_element: float


SETTINGS = (
    Setting("as the paper: to 10 Mbit/s, 1 s, float32", 10 / 95, 0.0, 1000.0, 1.0, 4),
    Setting("and 10 ms a message", 10 / 95, 10.0, 1000.0, 1.0, 4),
    Setting("int8, 5 ms a message, four requests a second, 200 ms", 10 / 95, 5.0, 200.0, 0.25, 1),
    Setting("unscaled, 5 ms a message, 200 ms", 1.0, 5.0, 200.0, 1.0, 4),
)


class LoggedLink:
    """A link whose bandwidth was logged; nothing crosses it after the log's end.

    Args:
        rows: (R, 3): duration in ms, bandwidth in kbit/s, unused.
        scale: Multiplies the bandwidths.
    """

    def __init__(self, rows: NDArray[np.int32], scale: float) -> None:
        seconds = rows[:, 0] / 1e3
        self._times = np.concatenate([[0.0], np.cumsum(seconds)])
        self._bits = np.concatenate([[0.0], np.cumsum(rows[:, 1] * 1e3 * scale * seconds)])
        self.duration_s = float(self._times[-1])
        self.mean_bits_per_s = float(self._bits[-1] / self._times[-1])

    def crossed(self, start_s: float, seconds: float) -> float:
        """Bits that cross in a time."""
        begin, end = np.interp([start_s, start_s + seconds], self._times, self._bits)
        return float(end - begin)

    def takes_s(self, start_s: float, bits: NDArray[np.float64]) -> NDArray[np.float64]:
        """How long each of some messages would take alone; infinite beyond the log."""
        target = np.interp(start_s, self._times, self._bits) + bits
        after = np.searchsorted(self._bits, target, side="left")
        inside = after < len(self._bits)
        after = np.clip(after, 1, len(self._bits) - 1)
        begin, end = self._bits[after - 1], self._bits[after]
        share = (target - begin) / np.where(end > begin, end - begin, 1.0)
        length = self._times[after] - self._times[after - 1]
        took = np.maximum(self._times[after - 1] + share * length - start_s, 0.0)
        return np.where(inside & (bits > 0), took, np.where(bits > 0, np.inf, 0.0))


def replay(link: LoggedLink, table: CostTable, setting: Setting, static: int) -> dict[str, float]:
    """Mean reward of each policy over one log.

    A policy knows only what its own last message, or a small probe where nothing was sent, has
    measured. The oracle knows what each strategy is going to give.
    """
    limit_s = setting.limit_ms / 1e3
    states = bandwidth_states(1e5 * setting.scale, 1e8 * setting.scale, 64)
    choosers = {by: Chooser(table, setting.limit_ms, states, by=by) for by in BY}
    mean_best = int(configuration_map(table, [link.mean_bits_per_s], setting.limit_ms)[0])
    worth = []
    got: dict[str, list[float]] = {by: [] for by in choosers}
    for start in np.arange(0.0, link.duration_s - 2 * limit_s, setting.period_s):
        sending_s = link.takes_s(start, table.sent_bits)
        latency = table.compute_ms + table.link_ms * table.messages + 1e3 * sending_s
        rewards = reward(table.accuracy, latency, setting.limit_ms)
        worth.append(rewards)
        for by, chooser in choosers.items():
            got[by].append(float(rewards[chooser.choice]))
            bits = float(table.sent_bits[chooser.choice]) or PROBE_BITS
            took = float(link.takes_s(start, np.array([bits]))[0])
            if took > limit_s:  # given up: what crossed until then
                took, bits = limit_s, link.crossed(start, limit_s)
            chooser.observe(bits / max(took, 1e-6))
    table_of_rewards = np.array(worth)
    return {
        "oracle": float(table_of_rewards.max(axis=1).mean()),
        **{by: float(np.mean(values)) for by, values in got.items()},
        "static": float(table_of_rewards[:, static].mean()),
        "fixed_by_reward": float(table_of_rewards[:, mean_best].mean()),
    }


def replays(found_ways: Mapping[float, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every setting over the 40 Belgium logs."""
    from exporter.methods.edgent.search import Search

    source = SHARED / "traces" / "belgium4g_norway3g_sabre.npz"
    if not source.exists():
        raise SystemExit(f"{source} is not there: set SHOAL_SHARED_DATA to the folder of INDEX.md")
    with np.load(source) as archive:
        logs = {name: archive[name] for name in archive.files if name.startswith("g4_")}
    results = []
    for setting in SETTINGS:
        search = Search(found_ways[setting.bytes_per_element], link_ms=setting.link_ms)
        rows = []
        for rows_of_log in logs.values():
            link = LoggedLink(rows_of_log, setting.scale)
            static = search.ways.index(search(link.mean_bits_per_s, setting.limit_ms).way)
            rows.append(replay(link, search.costs, setting, static))
        oracle = np.array([row["oracle"] for row in rows])
        of_oracle = {
            key: np.array([row[key] for row in rows]) / oracle for key in rows[0] if key != "oracle"
        }
        results.append(
            {
                "setting": setting.name,
                "logs": len(rows),
                "of_oracle": {k: round(float(v.mean()), 4) for k, v in of_oracle.items()},
                "worst_of_oracle": {k: round(float(v.min()), 4) for k, v in of_oracle.items()},
                "above_static": {by: int((of_oracle[by] > of_oracle["static"]).sum()) for by in BY},
                "above_fixed_by_reward": {
                    by: int((of_oracle[by] > of_oracle["fixed_by_reward"]).sum()) for by in BY
                },
            }
        )
    return results


def time_search(found_ways: Sequence[Any]) -> dict[str, Any]:
    """Microseconds of one search at random bandwidths and requirements."""
    from exporter.methods.edgent.search import Search

    search = Search(found_ways)
    rng = np.random.default_rng(0)
    rates, limits = 10 ** rng.uniform(4, 8, 20_000), rng.uniform(50, 1000, 20_000)
    took = np.empty(len(rates))
    for i, (rate, limit) in enumerate(zip(rates.tolist(), limits.tolist(), strict=True)):
        before = time.perf_counter()
        search(rate, limit)
        took[i] = time.perf_counter() - before
    exits = {way.exit for way in search.ways}
    return {"exits": len(exits), "ways": len(search.ways), **_percentiles_us(took)}


def time_change_points(samples: int) -> dict[str, Any]:
    """Microseconds of one update over many samples, and how much memory they took for good."""
    rng = np.random.default_rng(0)
    levels = np.repeat(rng.normal(6, 1, samples // 100 + 1), 100)[:samples]
    values = levels + rng.normal(0, 0.2, samples)
    changes = ChangePoints()
    took = np.ones(samples)
    held_bytes = 0
    for i in range(samples):
        value = float(values[i])
        before = time.perf_counter()
        changes.update(value)
        took[i] = time.perf_counter() - before
        if i == samples // 100:
            held_bytes = psutil.Process().memory_info().rss
    grown = psutil.Process().memory_info().rss - held_bytes
    state = sum(x.nbytes for x in vars(changes).values() if isinstance(x, np.ndarray))
    return {
        "samples": samples,
        "state_bytes": state,
        "grown_bytes": max(0, grown),
        **_percentiles_us(took),
    }


def _percentiles_us(seconds: NDArray[np.float64]) -> dict[str, float]:
    return {f"p{q}_us": round(float(np.percentile(seconds, q)) * 1e6, 1) for q in (50, 99)}


def measure(samples: int) -> dict[str, Any]:
    """Everything, with the paper's coefficients on branchy AlexNet."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from exporter.graph import layer_graph
    from exporter.methods.edgent.layers import chains
    from exporter.methods.edgent.profile import DEMONSTRATION
    from exporter.methods.edgent.search import ways
    from exporter.zoo.alexnet import branchy_alexnet

    found_chains = chains(layer_graph(branchy_alexnet()), fused=False)
    accuracies = load("edgent_alexnet")["test_accuracy"]
    device, server = DEMONSTRATION.of("paper-device"), DEMONSTRATION.of("paper-server")
    by_size = {
        size: ways(found_chains, accuracies, device, server, bytes_per_element=size)
        for size in sorted({setting.bytes_per_element for setting in SETTINGS})
    }
    return {
        "search": time_search(by_size[4]),
        "change_points": time_change_points(samples),
        "accuracies": accuracies,
        "replays": replays(by_size),
        "circumstances": circumstances("numpy"),
    }


def rows(result: dict[str, Any]) -> list[Row]:
    """The targets of the table."""
    search, changes = result["search"], result["change_points"]
    found = [
        Row(
            f"plan search, {search['exits']} exits x all points ({search['ways']} ways), p99",
            "<= 0.1 ms (paper: < 1 ms)",
            f"{search['p99_us'] / 1e3:.3f} ms",
            search["p99_us"] <= 100,
        ),
        Row(
            "change-point update a sample, p99",
            "<= 0.2 ms",
            f"{changes['p99_us'] / 1e3:.3f} ms",
            changes["p99_us"] <= 200,
        ),
        Row(
            f"its memory after {changes['samples']:,} samples",
            "bounded",
            f"{changes['state_bytes'] / 1e3:.0f} kB, "
            f"grown by {changes['grown_bytes'] / 1e3:.0f} kB",
            changes["grown_bytes"] < 1e6,
        ),
    ]
    for replayed in result["replays"]:
        of, above = replayed["of_oracle"]["expected"], replayed["above_static"]["expected"]
        found.append(
            Row(
                f"replay, {replayed['setting']}",
                f">= 95 % of the oracle, above static on >= 38 of {replayed['logs']}",
                f"{of * 100:.1f} %, {above}",
                of >= 0.95 and above >= 38,
            )
        )
    return found


def draw() -> str:
    """The table of the committed result, Markdown."""
    result = load(NAME)
    lines = [
        "# Edgent: where to cut and where to exit",
        "",
        HEADER,
        *map(str, rows(result)),
        *map(str, edgent_alexnet.rows(load(edgent_alexnet.NAME))),
        *map(str, edgent_live.rows(load(edgent_live.NAME))),
        "",
        "Replayed are the 40 Belgium 4G logs, simulated, a request a second or as said; mean "
        "reward as a share of what an oracle gets that knows the future.",
        "Static: Algorithm 1 once, at the log's mean bandwidth. Fixed: the strategy with the "
        "highest reward at that bandwidth. In brackets: above static and above fixed, on so many "
        "of the 40.",
        "Latencies by the paper's coefficients for branchy AlexNet; the exits' accuracies are "
        f"those of the trained one ({', '.join(f'{x:.3f}' for x in result['accuracies'])}).",
        "",
        "| setting | by expected reward | by state, as the paper | static | fixed |",
        "|---|---|---|---|---|",
    ]
    for replayed in result["replays"]:
        of = {key: f"{value * 100:.1f} %" for key, value in replayed["of_oracle"].items()}
        above, fixed = replayed["above_static"], replayed["above_fixed_by_reward"]
        lines.append(
            f"| {replayed['setting']} | {of['expected']} ({above['expected']}, "
            f"{fixed['expected']}) | {of['state']} ({above['state']}, {fixed['state']}) | "
            f"{of['static']} | {of['fixed_by_reward']} |"
        )
    lines += ["", BRIEF, "", f"Measured at: {machine_line(result)}", ""]
    alexnet = load(edgent_alexnet.NAME)
    return "\n".join([*lines, edgent_live.draw(), edgent_alexnet.draw(alexnet)])


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", action="store_true", help="save the result")
    chosen = parser.parse_args()
    result = measure(chosen.samples)
    return report(NAME, result, rows(result), as_json=chosen.json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
