"""The tables of benchmarks/lcp.py, drawn from its results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.lcp import CASES, DIGITS, result
from benchmarks.record import BRIEF, HEADER, Row, machine_line

Runs = Mapping[str, Mapping[str, dict[str, Any]]]
"""By case, then by seed."""


def _mean(values: Sequence[float]) -> str:
    points = [100 * value for value in values]
    spread = f" +- {statistics.stdev(points):.2f}" if len(points) > 1 else ""
    return f"{statistics.mean(points):.2f}{spread} ({len(points)})"


def draw() -> str:
    """The tables, Markdown."""
    told = result()
    lines = ["# LCP: branches in parallel, merged once", "", HEADER, *map(str, _goals(told))]
    if told["digits"]:
        lines += _digits_lines(told["digits"])
    if told["runs"]:
        lines += [
            "",
            "The paper's networks. Accuracy on all test images in percent, mean +- deviation "
            "(seeds), trained from the labels; fattened branches of CifarNet and the wide ResNet "
            "from the weights of their channels on, with the whole network as a teacher, as "
            "`shoal export` does. *p40*: 40 % of the channels of every trained branch pruned, then "
            "trained on as long again. *3.13*: 16-bit fixed point, emulated. "
            "*One lost*: the worst branch missing. *Sent*: payloads of all branches.",
            "",
            "| network | split | parameters | MACs | epochs | float | int8 fleet | 3.13 | "
            "one lost | sent | paper |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(name, list(runs.values())) for name, runs in _in_order(told["runs"])]
    lines += ["", BRIEF, "", *_counts_lines(told["counts"]), "", *_traffic_lines(told["traffic"])]
    lines += ["", f"Measured at {machine_line(told)}.", ""]
    return "\n".join(lines)


def _goals(told: dict[str, Any]) -> list[Row]:
    """The lines of the issue's table that were measured."""
    runs = told["runs"]
    return [
        *_counted(told["counts"]),
        *_lenets(runs),
        *_fattened(runs),
        *_pruned(runs, told["digits"]),
        *_tolerant(runs, told["digits"]),
        *_quantized(runs),
    ]


def _counted(counts: Sequence[dict[str, Any]]) -> list[Row]:
    printed = [row for row in counts if row["paper"] is not None]
    equal = sum(row["params"] == row["paper"] for row in printed)
    what = "exact parameter counts of the paper's tables"
    return [Row(what, "all equal", f"{equal} of {len(printed)}", equal == len(printed))]


def _lenets(runs: Runs) -> list[Row]:
    rows = []
    for split, paper in ((1, "98.76"), (2, "98.86"), (4, "98.93"), (8, "98.81")):
        if found := [run["int8"] for run in runs.get(f"lenet/{split}", {}).values()]:
            what = f"LeNet / MNIST, split {split}" if split > 1 else "LeNet / MNIST, whole"
            told_in = f"{_mean(found)} (paper {paper})"
            rows.append(Row(what, ">= 99.0", told_in, statistics.mean(found) >= 0.99))
    return rows


def _fattened(runs: Runs) -> list[Row]:
    """Eight branches, 40 % fattened, against the whole network."""
    narrow = pairs(runs, "cifarnet/8-f40", "cifarnet/1")
    rows = _below(
        "CifarNet / CIFAR-10, 8-f40: points below the whole, float",
        1.0,
        "3",
        [whole["float"] - split["float"] for split, whole in narrow],
    )
    for split, whole in narrow[:1]:
        smaller, fewer = whole["params"] / split["params"], whole["macs"] / split["macs"]
        waited = whole["macs"] / split["macs_branch"]
        told = f"{fewer:.2f}; of one branch, what an inference waits for, {waited:.1f}"
        rows += [
            Row("the same: times fewer parameters", ">= 3.8", f"{smaller:.2f}", smaller >= 3.8),
            Row("the same: times fewer MACs", ">= 2.5", told, fewer >= 2.5),
        ]
    wide = pairs(runs, "wrn-10-4/8-f40", "wrn-10-4/1")
    return rows + _below(
        "WRN-10-4 / CIFAR-10, 8-f40: points below the whole, float",
        1.5,
        "3.3, ResNet-50 on ImageNet",
        [whole["float"] - split["float"] for split, whole in wide],
    )


def _pruned(runs: Runs, digits: Runs) -> list[Row]:
    fat, thin = (split.text for split in DIGITS[3:5])
    rows = []
    for what, some, whole, source in (
        ("LeNet, split 8", "lenet/8-p40", "lenet/8", runs),
        ("CifarNet, 8-f40", "cifarnet/8-f40-p40", "cifarnet/8-f40", runs),
        ("digits, 8-f40", thin, fat, digits),
    ):
        rows += _below(
            f"{what}: 40 % of the channels pruned and int8, points below the unpruned in float",
            0.2,
            "0.1",
            [full["float"] - pruned["int8"] for pruned, full in pairs(source, some, whole)],
        )
    return rows


def _tolerant(runs: Runs, digits: Runs) -> list[Row]:
    rows = []
    for what, name, source in (
        ("LeNet, split 8", "lenet/8-tolerant", runs),
        ("CifarNet, 8-f40", "cifarnet/8-f40-tolerant", runs),
        ("digits, 8-f40", DIGITS[5].text, digits),
    ):
        rows += _below(
            f"{what}, loss-tolerant: worst branch lost, points below the whole fleet",
            3.0,
            "",
            [run["int8"] - run["one_lost"] for run in source.get(name, {}).values()],
        )
    return rows


def _quantized(runs: Runs) -> list[Row]:
    lost = [100 * (run["float"] - run["int8"]) for case in runs.values() for run in case.values()]
    what = "int8 fleet below the float fleet, any run of the paper's networks"
    return [Row(what, "<= 0.3", f"{max(lost):.2f} at most", max(lost) <= 0.3)] if lost else []


def pairs(runs: Runs, one: str, other: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs of two cases with the same seed."""
    known = runs.get(other, {})
    return [(run, known[seed]) for seed, run in runs.get(one, {}).items() if seed in known]


def _below(what: str, most: float, paper: str, shares: Sequence[float]) -> list[Row]:
    """A row for what is lost, in shares of 1; none if nothing was measured."""
    if not shares:
        return []
    found = f"{_mean(shares)} (paper {paper})" if paper else _mean(shares)
    return [Row(what, f"<= {most}", found, 100 * statistics.mean(shares) <= most)]


def _counts_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "Trained parameters and multiply-accumulates as counted from the layouts "
        "(`shoal counts lcp`).",
        "",
        "| network | split | classes | parameters | paper | MACs | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        split = f"{row['split']}" + (f"-f{row['fatten']}" if row["fatten"] else "")
        other = "-" if row["note"].startswith("not printed") else "differs"
        paper = {None: other, row["params"]: "equal"}.get(row["paper"], f"{row['paper']}")
        lines.append(
            f"| {row['model']} | {split} | {row['classes']} | {row['params']:,} | {paper} | "
            f"{row['macs'] / 1e6:,.3f} M | {row['note'] or '-'} |"
        )
    return lines


def _traffic_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "What one inference sends, counted (the paper's Fig. 11): pairs of devices that talk, "
        "summed over the layers, and bytes of int8 features without headers; branches, merged "
        "once, against every layer divided by its outputs.",
        "",
        "| network | devices | pairs: divided | branches | bytes: divided | branches | fewer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (pairs, sent), (many, much) = row["lcp"], row["model_parallel"]
        lines.append(
            f"| {row['model']} | {row['split']} | {many:,} | {pairs:,} | {much:,} | {sent:,} | "
            f"{much / sent:,.0f}x |"
        )
    return lines


def _digits_lines(digits: dict[str, Any]) -> list[str]:
    first = next(iter(next(iter(digits.values())).values()))
    lines = [
        "",
        f"The demo's network for digits ({first['params_base']:,} parameters, "
        f"{first['macs_base'] / 1e3:,.0f} k MACs, {100 * first['base']:.2f} %) split by "
        "`shoal export --method lcp`: accuracy on 359 test images in percent, mean +- deviation "
        "(seeds). One image is 0.28. *3.13*: 16-bit fixed point, emulated (where measured). "
        "*Tolerant*: each branch "
        "unheard 30 % of the time in training.",
        "",
        "| split | all branches | MACs of the largest | float | int8 fleet | 3.13 | "
        "worst branch lost | sent | the slowest calculates (estimated) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for split in DIGITS:
        runs = list(digits.get(split.text, {}).values())
        if runs:
            cells = [
                split.text,
                f"{runs[0]['params']:,.0f}",
                f"{runs[0]['macs_largest'] / 1e3:,.0f} k",
                *(_mean([run[key] for run in runs]) for key in ("float", "int8")),
                _mean([run["fixed"] for run in runs]) if "fixed" in runs[0] else "-",
                _mean([run["one_lost"] for run in runs]),
                f"{runs[0]['payload']:,.0f} B",
                f"{runs[0]['slowest_us']:,.0f} us" if split.kinds else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _in_order(runs: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, runs[name]) for name in CASES if name in runs]


def _line(name: str, runs: Sequence[dict[str, Any]]) -> str:
    case, first = CASES[name], runs[0]
    lost = "-" if first["one_lost"] is None else _mean([run["one_lost"] for run in runs])
    cells = [
        f"{case.text} / {case.data}",
        name.partition("/")[2],
        f"{first['params']:,}",
        f"{first['macs'] / 1e6:,.3f} M",
        f"{first['epochs']}",
        _mean([run["float"] for run in runs]),
        _mean([run["int8"] for run in runs]),
        _mean([run["fixed"] for run in runs]),
        lost,
        f"{first['payload']:,.0f} B" if case.split > 1 else "-",
        case.paper,
    ]
    return f"| {' | '.join(cells)} |"
