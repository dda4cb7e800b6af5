"""`make bench`: measures everything, or one group, and draws the tables from the results.

python -m benchmarks.run [GROUP ...] [--tables]

Each group is a list of commands that write benchmarks/results/*.json and a function that draws
benchmarks/results/GROUP.md from those files; the README shows the gist of them. `--tables` only
draws. Exit status 1: a measurement failed or missed a target; the table is drawn all the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import (
    codegen,
    codegen_binary,
    ddnn,
    ddnn_plots,
    edgent,
    edgent_plots,
    firmware,
    fleet_latency,
    fleet_memory,
    fleet_soak,
    latency,
    lcp,
    lcp_tables,
    measured_speedups,
    nonn,
    planned_fleets,
    planner,
    snn,
    speedups,
    zoo_exports,
)
from benchmarks.glance import draw as glance
from benchmarks.record import BRIEF, HEADER, RESULTS, ROOT, load, machine_line


@dataclass(frozen=True)
class Group:
    """What is measured together.

    Attributes:
        commands: Modules below `benchmarks`, each with its arguments.
        table: Draws the group's tables from the results, Markdown.
    """

    commands: tuple[tuple[str, ...], ...]
    table: Callable[[], str]


def runtime_table() -> str:
    """The figures of the fleet at run time."""
    lines = ["# The fleet at run time", "", HEADER]
    sources = []
    for module in (fleet_latency, fleet_memory, fleet_soak):
        result = load(module.NAME)
        lines += map(str, module.rows(result))
        sources.append(f"- `{module.NAME}`: {machine_line(result)}")
    return "\n".join([*lines, "", BRIEF, "", "Measured at:", *sources, ""])


GROUPS = {
    "runtime": Group(
        (
            ("fleet_latency", "--keep"),
            ("fleet_memory", "--keep"),
            ("fleet_soak", "--keep"),
        ),
        runtime_table,
    ),
    "snn": Group(
        (
            ("published_resnets", "--keep"),
            ("snn", "table", "lenet_mnist", "--seeds", "5"),
            ("snn", "table", "vgg16_cifar10"),
            ("snn", "table", "vgg16_cifar100"),
            ("snn", "table", "resnet56_cifar10"),
            ("snn", "ranking", "lenet_mnist", "--luck"),
            ("snn", "ranking", "vgg16_cifar10"),
        ),
        snn.draw,
    ),
    "ddnn": Group((("ddnn",), ("ddnn_live",)), ddnn.draw),
    "lcp": Group(
        (("lcp", "counts"), ("lcp", "digits"), ("lcp", "train", *lcp.CASES)),
        lcp_tables.draw,
    ),
    "nonn": Group(
        (
            ("nonn", "published"),
            ("nonn", "heads"),
            ("nonn", "filters"),
            ("nonn", "recipe", "digits"),
            ("nonn", "recipe", "resnet56_cifar10_brief", "--seeds", "1"),
        ),
        nonn.draw,
    ),
    "zoo_exports": Group((("zoo_exports",),), zoo_exports.draw),
    "edgent": Group(
        (("edgent", "--keep"), ("edgent_alexnet", "measure"), ("edgent_live", "--keep")),
        edgent.draw,
    ),
    "codegen": Group((("codegen", "--keep"),), codegen.draw),
    "codegen_binary": Group((("codegen_binary", "--keep"),), codegen_binary.draw),
    "firmware": Group(
        (
            ("firmware", "power", "--keep"),
            ("firmware", "fuzz", "--keep"),
            ("firmware", "line", "--keep"),
            ("firmware", "size", "--keep"),
        ),
        firmware.draw,
    ),
    "speedups": Group((("speedups", "--keep"),), speedups.draw),
    "planner": Group((("planner", "--keep"),), planner.draw),
    "planned_fleets": Group((("planned_fleets", "--keep"),), planned_fleets.draw),
    "latency": Group((("latency", "--keep"),), latency.draw),
    "measured_speedups": Group((("measured_speedups", "--keep"),), measured_speedups.draw),
}


FIGURES = {
    "ddnn": (ddnn_plots.PATH, ddnn_plots.draw),
    "edgent": (edgent_plots.PATH, edgent_plots.draw),
}
"""By group: where its figures go, and what draws them from the results."""

README = ROOT / "README.md"
IN_THE_README = (
    *("snn", "ddnn", "lcp", "nonn", "zoo_exports", "edgent", "speedups", "codegen", "firmware"),
    *("codegen_binary", "latency", "measured_speedups", "planner", "planned_fleets", "runtime"),
)
"""Tables, in their order."""
BEGIN, END = "<!-- results: drawn by `make bench` -->", "<!-- end of results -->"


def with_results(readme: str) -> str:
    """The README with all at a glance and the tables of results/*.md, shortened and folded."""
    tables = [brief(name, (RESULTS / f"{name}.md").read_text().strip()) for name in IN_THE_README]
    body = "\n\n".join([glance(), *map(folded, tables)])
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def brief(name: str, table: str) -> str:
    """What of a group's tables the README shows, with a link to the rest."""
    short = table.partition(BRIEF)[0].rstrip()
    if name == "snn":
        short = _last_steps(short)
    link = f"[benchmarks/results/{name}.md](benchmarks/results/{name}.md)"
    return short if short == table else f"{short}\n\nAll of it: {link}."


def folded(table: str) -> str:
    """A group's tables as a section that is closed until its title is clicked."""
    title, _, rest = table.partition("\n")
    return f"<details>\n<summary><b>{title.lstrip('# ')}</b></summary>\n{rest}\n\n</details>"


def _last_steps(table: str) -> str:
    """Of each base and number of SNNs the last step alone: the one with most done to the pieces."""
    last: dict[tuple[str, ...], str] = {}
    lines = table.splitlines()
    keys = []
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")]
        key = (cells[1], cells[2]) if len(cells) > 3 and cells[3] in snn.STEPS else None
        keys.append(key)
        if key is not None:
            last[key] = line
    return "\n".join(
        line for key, line in zip(keys, lines, strict=True) if key is None or last[key] == line
    )


def main() -> int:
    """Measure, draw, and put the tables into the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--tables", action="store_true", help="draw from what was measured before")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.groups if name not in GROUPS]:
        parser.error(f"no group {unknown[0]!r}; there are: {', '.join(GROUPS)}")
    status = 0
    for name in chosen.groups or GROUPS:
        group = GROUPS[name]
        for module, *arguments in () if chosen.tables else group.commands:
            print(f"$ python -m benchmarks.{module} {' '.join(arguments)}", file=sys.stderr)
            command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
            status |= subprocess.run(command, cwd=ROOT, check=False).returncode != 0
        text = group.table()
        (RESULTS / f"{name}.md").write_text(text)
        print(text)
        if name in FIGURES:
            path, figure = FIGURES[name]
            (ROOT / path).write_text(figure())
    README.write_text(with_results(README.read_text()))
    return status


if __name__ == "__main__":
    sys.exit(main())
