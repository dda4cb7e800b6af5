"""The papers' speed-ups from one command: estimated by walking plans, on the papers' platforms.

python -m benchmarks.speedups [--keep] [--json]

Nothing here is measured. *Uncalibrated* is the platform file as it is; *calibrated* has constants
fitted to a paper's own figures, each named in the result; a figure that a constant was fitted to is
marked, all others are predictions. The network reading is part of each result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import floor, log, sqrt
from typing import Any

from agent.protocol.plan import FRAME, Exit, Fusion, Node, Output, Piece, Plan, Strategy
from benchmarks.record import BRIEF, RESULTS, Row, circumstances, load, machine_line, report
from exporter.cost.platform import Constant, Platform, load_platform
from exporter.cost.shapes import VGG16_WIDTHS, bottleneck_resnet, graph_of, vgg16, wide_resnet
from exporter.cost.walk import Network, PlanCost, Setting, plan_cost
from exporter.cost.work import PieceWork, work_of
from exporter.graph import LayerGraph
from exporter.methods.layerwise.cut import divide, part_graph, plan_of
from exporter.methods.layerwise.schemes import LOP_ONLY, PAPER, Rules, cheapest
from exporter.methods.layerwise.steps import hub_graph
from exporter.methods.lcp.counts import split_counts
from exporter.zoo.papers import narrow, paper_network

NAME = "speedups"
FRAME_ELEMENTS = 224 * 224 * 3
SNNS = tuple(range(2, 21))
SHOWN = (2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
"""In the table; the file of results has them all."""
CLASSES = [str(i) for i in range(100)]

EDGENAI_READING = (
    "16 bit values; 100 Mbit/s that all devices share, one transmission to each receiver, 0.5 ms a "
    "message; VGG-16 for 100 classes of 160 MB; the baseline broadcasts its input, the SNNs read "
    "sensors of their own; the largest SNN has 0.82 of the base at 2 SNNs and 0.48 at 20, in "
    "between by the logarithm of its classes, pruned in the last six hidden layers (VGG-16) or "
    "within the blocks of the last two stages (ResNet-152); on platform 2 activations stay on chip "
    "in rows, and weights are fetched ahead as far as 500 kB hold them"
)
LCP_READING = (
    "62.24 Mbit/s shared, 8.83 ms a message (the paper's 64 B), float32 on the Raspberry Pi, "
    "16 bit on the arrays; model parallelism as in the paper: every layer's outputs to all "
    "devices, one transmission to each"
)
WIFI = Network(rate_bits_per_s=62.24e6, latency_s=0.00883)


def constant(value: float, source: str) -> Constant[Any]:
    """A platform's figure that comes from here."""
    return Constant[Any].model_construct(value=value, source=source)


def with_cycles(platform: Platform, cycles: float) -> Platform:
    """The platform with so many cycles a step of its array."""
    compute = platform.compute.model_copy(update={"cycles_per_step": constant(cycles, "fitted")})
    return platform.model_copy(update={"compute": compute, "calibrated": "cycles_per_step"})


def with_rate(platform: Platform, bytes_per_s: float) -> Platform:
    """The platform with an off-chip memory of this rate."""
    assert platform.off_chip is not None
    off = platform.off_chip.model_copy(update={"rate": constant(bytes_per_s, "fitted")})
    return platform.model_copy(update={"off_chip": off, "calibrated": "off-chip rate"})


def with_macs(platform: Platform, per_s: float) -> Platform:
    """The platform with so many multiply-accumulates a second."""
    compute = platform.compute.model_copy(update={"macs": constant(per_s, "fitted")})
    return platform.model_copy(update={"compute": compute, "calibrated": "macs"})


def fitted(goal: float, value: Callable[[float], float], low: float, high: float) -> float:
    """Where a monotonic function reaches a goal, by bisection of the logarithm."""
    rising = value(high) > value(low)
    for _ in range(60):
        middle = sqrt(low * high)
        if (value(middle) < goal) == rising:
            low = middle
        else:
            high = middle
    return sqrt(low * high)


# Plans from shapes.

Case = tuple[Plan, Mapping[str, PieceWork], tuple[str, ...]]


def parallel_plan(
    branches: Sequence[LayerGraph], head: LayerGraph | None, fusion: Fusion, element_bytes: float
) -> Case:
    """One piece a device, all on the frame; the desk fuses, and runs the head if there is one."""
    answers = fusion is Fusion.MIN_ENTROPY
    output = Output.FEATURES
    works = {f"b{i}": work_of(graph, element_bytes) for i, graph in enumerate(branches)}
    pieces = []
    for name in works:
        rule = {"classes": (0,), "logits": (0, "rest"), "dont_know_threshold": 1.0}
        pieces.append(
            Piece.model_validate(
                {
                    "name": name,
                    "inputs": (FRAME,),
                    "outputs": (Output.ANSWER if answers else output,),
                    "answer": rule if answers else None,
                }
            )
        )
    nodes = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=name) for i, name in enumerate(works)]
    heard = tuple(node.name for node in nodes)
    if head is not None:
        works["head"] = work_of(head, element_bytes)
        pieces.append(
            Piece(name="head", inputs=tuple(p.name for p in pieces), outputs=(Output.SCORES,))
        )
    nodes.append(
        Node(
            name="desk",
            device="desk",
            tier=1,
            piece=None if head is None else "head",
            listens_to=heard,
            fusion=fusion,
        )
    )
    strategy = Strategy(name="only", nodes=tuple(nodes), exits=(Exit(tier=1, threshold=1.0),))
    plan = Plan(method="lcp", classes=("a", "b"), pieces=tuple(pieces), strategies=(strategy,))
    return plan, works, tuple(dict.fromkeys(node.device for node in nodes))


def divided_plan(graph: LayerGraph, devices: int, rules: Rules, element_bytes: float) -> Case:
    """Layer-wise, by the cheapest division; the first device holds, sums and decides."""
    network = hub_graph(graph)
    places = divide(network, cheapest(network, devices, rules).schemes, devices, rules)
    ids = (*(f"d{i}" for i in range(devices)), "d0")
    works = {x.part.name: work_of(part_graph(x.part), element_bytes) for x in places if x.part}
    return plan_of(places, ids, CLASSES), works, ids


def walked(
    case: Case, platform: Platform, network: Network, *, asker: str | None, frame_bytes: float
) -> PlanCost:
    """What one decision costs, all devices being alike."""
    plan, works, devices = case
    setting = Setting(dict.fromkeys(devices, platform), network, asker, frame_bytes, True)
    costs = plan_cost(plan, works, setting)
    return costs[max(costs)]


# Edge^nAI, Fig. 5.


def snn_share(snns: int) -> float:
    """Size of the largest SNN against the base: 0.82 at 50 classes, 0.48 at 5."""
    return 0.48 + (0.82 - 0.48) * log(20 / snns) / log(10)


@cache
def pruned(network: str, snns: int) -> LayerGraph:
    """The largest of so many SNNs for 100 classes."""
    return sized(network, snn_share(snns) * base(network).parameters)


@cache
def base(network: str) -> LayerGraph:
    """The undivided network: of VGG-16 the paper's variant of 160 MB, lightly pruned itself."""
    return sized(network, 80e6) if network == "VGG-16" else GRAPHS[network](1.0)


def sized(network: str, parameters: float) -> LayerGraph:
    """The network with its last layers as narrow as that takes."""
    share = fitted(parameters, lambda x: GRAPHS[network](x).parameters, 0.05, 1.0)
    return GRAPHS[network](share)


def _vgg(share: float) -> LayerGraph:
    last = list(VGG16_WIDTHS)[-6:]
    return vgg16(100, widths={name: round(VGG16_WIDTHS[name] * share) for name in last})


def _resnet(share: float) -> LayerGraph:
    return bottleneck_resnet(100, inner=(64, 128, round(256 * share), round(512 * share)))


GRAPHS: Mapping[str, Callable[[float], LayerGraph]] = {"VGG-16": _vgg, "ResNet-152": _resnet}
PAPER_SPEEDUPS = {
    ("VGG-16", "edgenai-1"): 17.0,
    ("VGG-16", "edgenai-2"): 5.5,
    ("ResNet-152", "edgenai-1"): 9.0,
    ("ResNet-152", "edgenai-2"): 7.5,
}


@cache
def edgenai_case(network: str, snns: int, kind: str) -> Case:
    """SNNs (`snn`), or the base divided with fusion (`fused`) or without (`broadcast`)."""
    if kind == "snn":
        return parallel_plan([pruned(network, snns)] * snns, None, Fusion.MIN_ENTROPY, 2)
    rules = {"fused": PAPER, "broadcast": LOP_ONLY}[kind]
    return divided_plan(base(network), snns, rules, 2)


def edgenai_seconds(network: str, snns: int, kind: str, platform: Platform) -> float:
    """Seconds of a decision of `edgenai_case`."""
    case = edgenai_case(network, snns, kind)
    divided = kind != "snn"
    cost = walked(
        case,
        platform,
        Network(),
        asker="d0" if divided else None,
        frame_bytes=2 * FRAME_ELEMENTS if divided else 0,
    )
    return cost.latency_s


def edgenai_speedup(network: str, snns: int, baseline: str, platform: Platform) -> float:
    """Of SNNs over the base divided in one way or the other."""
    slow = edgenai_seconds(network, snns, baseline, platform)
    return slow / edgenai_seconds(network, snns, "snn", platform)


def edgenai(baseline: str, second: Platform, snns: Sequence[int]) -> dict[str, Any]:
    """Curves and anchors against one baseline, constants fitted on VGG-16 alone."""
    first = load_platform("edgenai-1")
    cycles = fitted(
        17.0, lambda x: edgenai_speedup("VGG-16", 20, baseline, with_cycles(first, x)), 1, 1e4
    )

    def on_second(rate: float) -> float:
        platform = with_rate(with_cycles(second, cycles), rate)
        return edgenai_speedup("VGG-16", 20, baseline, platform)

    rate = fitted(5.5, on_second, 1e7, 1e11)
    platforms = {
        "edgenai-1": (first, with_cycles(first, cycles)),
        "edgenai-2": (second, with_rate(with_cycles(second, cycles), rate)),
    }
    curves: dict[str, Any] = {}
    anchors = []
    for (network, name), paper in PAPER_SPEEDUPS.items():
        plain, calibrated = platforms[name]
        curve = {
            n: {
                "uncalibrated": edgenai_speedup(network, n, baseline, plain),
                "calibrated": edgenai_speedup(network, n, baseline, calibrated),
            }
            for n in snns
        }
        curves.setdefault(network, {})[name] = curve
        anchors.append(
            {
                "network": network,
                "platform": name,
                "paper": paper,
                "calibrated": curve[20]["calibrated"],
                "uncalibrated": curve[20]["uncalibrated"],
                "fitted": network == "VGG-16",
            }
        )
    return {
        "baseline": baseline,
        "fitted": {"cycles_per_step": cycles, "off_chip_bytes_per_s": rate},
        "anchors": anchors,
        "curves": curves,
    }


def memory_readings() -> dict[str, Platform]:
    """Platform 2 as stated, and as two simpler readings of its memory have it."""
    stated = load_platform("edgenai-2")
    layer = stated.model_copy(update={"overlap": constant("layer", "a simpler reading")})
    spills = layer.on_chip.model_copy(update={"line_buffers": None})
    return {
        "rows on chip, weights ahead": stated,
        "rows on chip, weights of the layer at work": layer,
        "activations beyond 500 kB off chip": layer.model_copy(update={"on_chip": spills}),
    }


# LCP.

LCP_NETWORKS = ("lenet", "cifarnet", "vgg-s", "alexnetv2", "vgg16", "resnet18", "resnet50")
LCP_STEPS = {
    "8 branches": (0.0, 0.0, 4),
    "40 % fatter": (0.4, 0.0, 4),
    "40 % pruned": (0.4, 0.4, 4),
    "16 bit": (0.4, 0.4, 2),
    "8 bit": (0.4, 0.4, 1),
}
"""Each with those before it: fattened by, pruned by, bytes of a value."""
PI_ANCHORS = (
    ("vgg16", 1, 0.0, 9.4),
    ("alexnetv2", 1, 0.0, 2.8),
    ("vgg16", 8, 0.0, 0.400),
    ("vgg16", 8, 0.4, 0.400),
    ("alexnetv2", 8, 0.0, 0.115),
    ("alexnetv2", 8, 0.4, 0.115),
)


@cache
def lcp_case(
    network: str, split: int, fatten: float, element_bytes: float, prune: float = 0.0
) -> Case:
    """Branches and their head; of every layer of a branch a share of the channels is pruned."""
    paper = paper_network(network)
    narrowed = narrow(split, fatten, paper.rounding)
    branch = paper.trunk(lambda whole: max(1, floor(narrowed(whole) * (1 - prune) + 0.5)))
    (features,) = branch.output.shape
    fusion = paper.merge if split > 1 else Fusion.CONCAT
    head = paper.head(features * (split if fusion is Fusion.CONCAT else 1), paper.classes)
    return parallel_plan([graph_of(branch)] * split, graph_of(head), fusion, element_bytes)


def lcp_seconds(
    network: str,
    split: int,
    fatten: float,
    platform: Platform,
    *,
    prune: float = 0.0,
    element_bytes: float | None = None,
) -> float:
    """Seconds of a decision of `lcp_case`; of the whole network where it is not split."""
    own = 4 if platform.element_bits is None else platform.element_bits.value / 8
    quiet = WIFI if split > 1 else Network(latency_s=0, rate_bits_per_s=1e18)
    case = lcp_case(network, split, fatten, element_bytes or own, prune)
    return walked(case, platform, quiet, asker=None, frame_bytes=0).latency_s


def lcp_steps(platform: Platform) -> dict[str, Any]:
    """Of each network: seconds of the whole, and how much faster each step of LCP makes it."""
    found = {}
    for network in LCP_NETWORKS:
        whole = lcp_seconds(network, 1, 0.0, platform)
        found[network] = {
            "whole_s": whole,
            **{
                name: whole
                / lcp_seconds(
                    network, 8, fatten, platform, prune=prune, element_bytes=element_bytes
                )
                for name, (fatten, prune, element_bytes) in LCP_STEPS.items()
            },
        }
    return found


@cache
def whole_network(network: str) -> LayerGraph:
    """One of LCP's networks, with its head."""
    counts = split_counts(network, 1)
    whole = counts.network.trunk(lambda width: width)
    whole.dense("logits", whole.output.name, counts.network.classes, relu=False)
    return graph_of(whole)


def model_parallel_seconds(network: str, devices: int, platform: Platform) -> float:
    """Every layer's outputs divided, pooled where they are, and sent to all."""
    case = divided_plan(whole_network(network), devices, Rules(lip=False), 2)
    elements = split_counts(network, 1).branch.steps[0].shape
    size = 2.0
    for side in elements:
        size *= side
    return walked(case, platform, WIFI, asker="d0", frame_bytes=size).latency_s


def lcp() -> dict[str, Any]:
    """LCP on the Pi, fitted on the two originals, and on the arrays, as they are stated."""
    plain = load_platform("pi-3")
    # Dense layers wait for memory, convolutions for arithmetic: the two originals fix both rates.
    macs, rate = 1e9, 1e9
    for _ in range(30):
        known_macs, known_rate = macs, rate
        macs = fitted(
            9.4,
            lambda x, r=known_rate: lcp_seconds("vgg16", 1, 0, with_rate(with_macs(plain, x), r)),
            1e8,
            1e12,
        )
        rate = fitted(
            2.8,
            lambda x, m=macs: lcp_seconds("alexnetv2", 1, 0, with_rate(with_macs(plain, m), x)),
            1e6,
            1e11,
        )
        if abs(macs / known_macs - 1) + abs(rate / known_rate - 1) < 1e-6:
            break
    pi = with_rate(with_macs(plain, macs), rate)
    anchors = [
        {
            "network": network,
            "split": split,
            "fatten": fatten,
            "paper_s": paper,
            "uncalibrated_s": lcp_seconds(network, split, fatten, plain),
            "calibrated_s": lcp_seconds(network, split, fatten, pi),
            "fitted": split == 1,
        }
        for network, split, fatten, paper in PI_ANCHORS
    ]
    table = []
    for network in LCP_NETWORKS:
        row: dict[str, Any] = {"network": network}
        for name in ("lcp-fpga", "lcp-asic"):
            platform = load_platform(name)
            divided = model_parallel_seconds(network, 8, platform)
            split = lcp_seconds(network, 8, 0.0, platform)
            row[name] = {
                "model_parallel_s": divided,
                "split8_s": split,
                "split8_f40_s": lcp_seconds(network, 8, 0.4, platform),
                "single_s": lcp_seconds(network, 1, 0.0, platform),
                "speedup": divided / split,
            }
        table.append(row)
    return {
        "pi": {
            "fitted": {"macs_per_s": macs, "memory_bytes_per_s": rate},
            "anchors": anchors,
            "steps": lcp_steps(pi),
        },
        "arrays": {
            "paper_average_fpga": 7.2,
            "networks": table,
        },
    }


# NoNN.


def nonn() -> dict[str, Any]:
    """WRN40-4 against two students of WRN16-1, on a Raspberry Pi each."""
    plain = load_platform("pi-3")
    teacher = parallel_plan([wide_resnet(40, (64, 128, 256), 10)], None, Fusion.CONCAT, 4)
    student = wide_resnet(16, (16, 32, 64), 49)
    students = parallel_plan([student] * 2, None, Fusion.CONCAT, 4)

    def seconds(case: Case, platform: Platform) -> float:
        network = WIFI if len(case[2]) > 2 else Network(latency_s=0, rate_bits_per_s=1e18)
        return walked(case, platform, network, asker=None, frame_bytes=0).latency_s

    rate = fitted(1.878, lambda x: seconds(teacher, with_macs(plain, x)), 1e8, 1e11)
    calibrated = with_macs(plain, rate)
    return {
        "reading": "float32, 62.24 Mbit/s and 8.83 ms a message from each student to the host",
        "fitted": {"macs_per_s": rate},
        "teacher_macs": sum(work.macs for work in teacher[1].values()),
        "student_macs": work_of(student, 4).macs,
        "paper": {"teacher_s": 1.878, "students_s": 0.150, "speedup": 12.4},
        "uncalibrated": {
            "teacher_s": seconds(teacher, plain),
            "students_s": seconds(students, plain),
        },
        "calibrated": {
            "teacher_s": seconds(teacher, calibrated),
            "students_s": seconds(students, calibrated),
        },
    }


# The report.


def measure() -> dict[str, Any]:
    """Everything that `draw` shows."""
    return {
        "edgenai": {
            "reading": EDGENAI_READING,
            "fused": edgenai("fused", load_platform("edgenai-2"), SNNS),
            "broadcast": edgenai("broadcast", load_platform("edgenai-2"), (20,)),
            "memory": {
                words: edgenai("fused", platform, (20,))["anchors"]
                for words, platform in memory_readings().items()
            },
        },
        "lcp": {"reading": LCP_READING, **lcp()},
        "nonn": nonn(),
        "circumstances": circumstances("numpy"),
    }


def rows(result: dict[str, Any]) -> list[Row]:
    """Targets; a figure that a constant was fitted to is reported, not met."""
    found = []
    for anchor in result["edgenai"]["fused"]["anchors"]:
        error = anchor["calibrated"] / anchor["paper"] - 1
        number = anchor["platform"][-1]
        found.append(
            Row(
                f"Edge^nAI over layer-wise, {anchor['network']}, platform {number}, 20 devices "
                f"(estimated, {'constant' if anchor['fitted'] else 'reading'} chosen by it)",
                f"{anchor['paper']:g}x within 15 %",
                f"{anchor['calibrated']:.1f}x ({error * 100:+.0f} %); uncalibrated "
                f"{anchor['uncalibrated']:.0f}x",
                None if anchor["fitted"] else abs(error) <= 0.15,
            )
        )
    small = [
        row["lcp-fpga"]["speedup"]
        for row in result["lcp"]["arrays"]["networks"]
        if row["network"] in ("lenet", "cifarnet")
    ]
    found.append(
        Row(
            "LCP over model parallelism, 8 devices, FPGA array, LeNet and CifarNet (estimated, "
            "uncalibrated)",
            "7.2x on average, of networks not named here",
            " and ".join(f"{x:.1f}x" for x in small),
            None,
        )
    )
    return found


def draw() -> str:
    """benchmarks/results/speedups.md."""
    result = load(NAME)
    lines = [
        "# The papers' speed-ups, estimated",
        "",
        "Nothing here is measured: plans are walked on the papers' platforms, from shapes. A "
        "*fitted* row has a constant that was chosen so that it comes out. No constant was fitted "
        "to the other rows of Edge^nAI, but the baseline and the reading of platform 2's memory "
        "were chosen with the paper's figures in view: they show that one reading gives all four, "
        "not that the model foretells them. With the other baseline it does not.",
        "",
        *_edgenai_lines(result["edgenai"]),
        "",
        *_lcp_lines(result["lcp"]),
        "",
        *_nonn_lines(result["nonn"]),
        "",
        f"Fitted on the teacher. {machine_line(result)}",
        "",
    ]
    return "\n".join(lines)


def _edgenai_lines(edge: dict[str, Any]) -> list[str]:
    lines = [
        "| speed-up at 20 devices | paper | uncalibrated | calibrated | error | |",
        "|---|---|---|---|---|---|",
    ]
    for words, part in (
        ("the optimum with fusion", edge["fused"]),
        ("broadcast of every output", edge["broadcast"]),
    ):
        for a in part["anchors"]:
            error = a["calibrated"] / a["paper"] - 1
            lines.append(
                f"| Edge^nAI over {words}, {a['network']}, platform {a['platform'][-1]} "
                f"| {a['paper']:g}x | {a['uncalibrated']:.0f}x | {a['calibrated']:.1f}x "
                f"| {error * 100:+.0f} % | {'fitted' if a['fitted'] else 'reading chosen'} |"
            )
    fit = edge["fused"]["fitted"]
    lines += [
        "",
        f"Reading: {edge['reading']}. Two constants are fitted, both on VGG-16 against the "
        f"baseline with fusion: {fit['cycles_per_step']:.0f} ns for one output of the array "
        f"(platform 1), {fit['off_chip_bytes_per_s'] / 1e6:.0f} MB/s of the shared store "
        "(platform 2). ResNet-152 is reckoned with them.",
        "",
        BRIEF,
        "",
        "| ResNet-152, platform 2, by the reading of its memory | paper | reckoned |",
        "|---|---|---|",
        *(
            f"| {words} | {anchors[-1]['paper']:g}x | {anchors[-1]['calibrated']:.1f}x |"
            for words, anchors in edge["memory"].items()
        ),
        "",
        "| speed-up by devices | " + " | ".join(str(n) for n in SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for network, by_platform in edge["fused"]["curves"].items():
        for name, curve in by_platform.items():
            for kind in ("calibrated", "uncalibrated"):
                values = " | ".join(f"{curve[str(n)][kind]:.1f}" for n in SHOWN)
                lines.append(f"| {network}, platform {name[-1]}, {kind} | {values} |")
    return lines


def _lcp_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "| LCP on Raspberry Pi 3 | paper | uncalibrated | calibrated | error | |",
        "|---|---|---|---|---|---|",
    ]
    for a in found["pi"]["anchors"]:
        fat = f", {a['fatten'] * 100:.0f} % fatter" if a["fatten"] else ""
        error = a["calibrated_s"] / a["paper_s"] - 1
        lines.append(
            f"| {a['network']}, {a['split']} branch{'es' if a['split'] > 1 else ''}{fat} "
            f"| {a['paper_s'] * 1e3:.0f} ms | {a['uncalibrated_s'] * 1e3:.0f} ms "
            f"| {a['calibrated_s'] * 1e3:.0f} ms | {error * 100:+.0f} % "
            f"| {'fitted' if a['fitted'] else 'predicted'} |"
        )
    fit = found["pi"]["fitted"]
    lines += [
        "",
        f"Reading: {found['reading']}. Fitted on the two originals: "
        f"{fit['macs_per_s'] / 1e9:.1f} G MACs/s, {fit['memory_bytes_per_s'] / 1e6:.0f} MB/s for "
        "weights. The paper's figures at 8 branches do not say how fat.",
        "",
        f"| speed-up over the whole on one Pi 3, calibrated | whole | {' | '.join(LCP_STEPS)} |",
        f"|---|---|{'---|' * len(LCP_STEPS)}",
    ]
    steps = found["pi"]["steps"]
    lines += [
        f"| {network} | {row['whole_s'] * 1e3:.0f} ms | "
        f"{' | '.join(f'{row[name]:.1f}x' for name in LCP_STEPS)} |"
        for network, row in steps.items()
    ]
    means = [sum(row[name] for row in steps.values()) / len(steps) for name in LCP_STEPS]
    lines += [
        f"| mean | - | {' | '.join(f'{mean:.1f}x' for mean in means)} |",
        "",
        "Each step comes on top of those before it (LCP, Fig. 17: 7x on average, 56x at most; 33x "
        "on average with 40 to 50 % of the channels pruned and 16 bit). Fewer bits cost less "
        "memory here, arithmetic is reckoned as in float32. Every message takes 8.83 ms: what is "
        "small enough for one device is slower on eight.",
        "",
        "| LCP against model parallelism, 8 devices, uncalibrated | FPGA: divided | 8 branches "
        "| speed-up | ASIC: divided | 8 branches | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["arrays"]["networks"]:
        cells = [
            f"{row[name]['model_parallel_s'] * 1e3:.0f} ms | {row[name]['split8_s'] * 1e3:.1f} ms "
            f"| {row[name]['speedup']:.1f}x"
            for name in ("lcp-fpga", "lcp-asic")
        ]
        lines.append(f"| {row['network']} | {' | '.join(cells)} |")
    lines += [
        "",
        "The paper reports 7.2x on average on FPGAs; of which networks is not known to us. LeNet "
        "and CifarNet, which fit such a device, are at that; larger networks divided layer by "
        "layer spend all their time sending.",
    ]
    return lines


def _nonn_lines(students: dict[str, Any]) -> list[str]:
    lines = [
        "| NoNN, WRN40-4 against two WRN16-1 | paper | uncalibrated | calibrated |",
        "|---|---|---|---|",
    ]
    for key, words in (("teacher_s", "teacher"), ("students_s", "students")):
        cells = [
            f"{students[kind][key] * 1e3:.0f} ms"
            for kind in ("paper", "uncalibrated", "calibrated")
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    ratios = [
        students[kind]["teacher_s"] / students[kind]["students_s"]
        for kind in ("uncalibrated", "calibrated")
    ]
    lines.append(f"| speed-up | 12.4x | {ratios[0]:.1f}x | {ratios[1]:.1f}x |")
    return lines


def main() -> int:
    """Estimate, print, and perhaps keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help=f"write {RESULTS.name}/{NAME}.json")
    parser.add_argument("--json", action="store_true", dest="as_json")
    chosen = parser.parse_args()
    result = measure()
    return report(NAME, result, rows(result), as_json=chosen.as_json, keep=chosen.keep)


if __name__ == "__main__":
    sys.exit(main())
