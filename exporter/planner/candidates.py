"""What could be tried on a fleet: methods, who takes part, and a few settings of each. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from agent.protocol.fleet import Device, Fleet
from exporter.cost.bundle import PLATFORM_OF_KIND
from exporter.cost.platform import Processor, load_platform

Setting = bool | int | float | str | tuple[int, ...] | None


@dataclass(frozen=True)
class Candidate:
    """One method with its settings, on some devices.

    Attributes:
        method: Its name.
        devices: Ids of who takes part, in file order: devices of tier 0, and of `single` any one.
        settings: Options of `shoal export` that differ from their defaults, by parameter name.
    """

    method: str
    devices: tuple[str, ...]
    settings: tuple[tuple[str, Setting], ...] = ()

    @property
    def name(self) -> str:
        """In a few words, unique in its space."""
        return " ".join([self.method, self.settings_text, f"on {' '.join(self.devices)}"]).replace(
            "  ", " "
        )

    @property
    def settings_text(self) -> str:
        """The settings as options of the command."""
        words = []
        for name, value in self.settings:
            option = f"--{_OPTION_OF.get(name, name).replace('_', '-')}"
            values = value if isinstance(value, tuple) else (value,)
            if value is True:
                words.append(option)
            elif value is False or value is None:
                continue
            else:
                words += [f"{option} {one}" for one in values]
        return " ".join(words)

    def fleet(self, whole: Fleet) -> Fleet:
        """The fleet as its method sees it: of tier 0 only those who take part."""
        if self.method == "single":
            return whole
        kept = tuple(
            device for device in whole.devices if device.tier > 0 or device.id in self.devices
        )
        return whole.model_copy(update={"devices": kept})


_OPTION_OF = {"ddnn_filters": "filters"}
SETTINGS: Mapping[str, tuple[Mapping[str, Setting], ...]] = {
    "single": ({},),
    "layerwise": ({},),
    "lcp": tuple({"fatten": 10.0 * step} for step in range(11)),
    "nonn": tuple({"ratio": ratio} for ratio in (20.0, 16.0, 12.0, 10.0, 8.0, 6.0, 5.0, 4.0)),
    "snn": (
        {"quick": True},
        *({"quick": True, "keep": share} for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)),
    ),
    "edgent": ({},),
    "ddnn": tuple({"ddnn_filters": (filters,)} for filters in (2, 3, 4, 6, 8, 12, 16)),
}
"""What is tried of each method: LCP's branches and NoNN's students in several widths, SNNs pruned
by accuracy or to a share; Edgent tries its own exits and cuts."""
TRAINED = ("lcp", "snn", "edgent", "nonn", "ddnn")
"""Methods that train, in the order in which they are tried: first those that begin with the
model's own weights. The others only cut."""


def speed(device: Device) -> float:
    """Multiply-accumulates a second of what stands for a device, to put devices in order."""
    compute = load_platform(PLATFORM_OF_KIND[device.kind]).compute
    return compute.macs.value if isinstance(compute, Processor) else 0.0


def groups(fleet: Fleet) -> Iterator[tuple[str, ...]]:
    """Who may take part together, two or more: all, the fastest half and two, all of a kind."""
    workers = fleet.workers
    order = sorted(range(len(workers)), key=lambda i: (-speed(workers[i]), i))
    found: dict[tuple[str, ...], None] = {}
    for count in (len(workers), -(-len(workers) // 2), 2):
        if 2 <= count <= len(workers):
            chosen = sorted(order[:count])
            found[tuple(workers[i].id for i in chosen)] = None
    for kind in dict.fromkeys(device.kind for device in workers):
        alike = tuple(device.id for device in workers if device.kind is kind)
        if len(alike) >= 2:
            found[alike] = None
    yield from found


def alone(devices: Iterable[Device]) -> tuple[str, ...]:
    """One device of each sort: of those with the same kind and budgets the first."""
    found: dict[tuple[object, ...], str] = {}
    for device in devices:
        sort = (device.kind, device.tier, device.memory_bytes, device.flash_bytes)
        found.setdefault(sort, device.id)
    return tuple(found.values())


def space(
    fleet: Fleet,
    *,
    views: int | None = None,
    images: bool = True,
    fixed: Mapping[str, Mapping[str, Setting]] | None = None,
    methods: Iterable[str] = tuple(SETTINGS),
) -> tuple[Candidate, ...]:
    """Everything that could be tried, the whole network on one device first.

    Args:
        fleet: The devices.
        views: How many frames a sample has, each for another device; None: one for all.
        images: Whether frames are images of bytes.
        fixed: By method, settings that the user fixed; they replace those of the same name.
        methods: Names of methods to try.
    """
    found: dict[Candidate, None] = {}
    workers = fleet.workers
    for method in methods:
        if method == "single":
            teams: tuple[tuple[str, ...], ...] = tuple((one,) for one in alone(fleet.devices))
        elif method == "ddnn":
            everybody = tuple(device.id for device in workers)
            # One view is for one device: its blocks are the same on any, so the fastest.
            teams = (everybody,) if views else ((max(workers, key=speed).id,),)
        elif method == "edgent":
            teams = tuple((one,) for one in alone(workers))
        else:
            teams = tuple(groups(fleet))
        if (views and method != "ddnn") or (method == "ddnn" and not images):
            continue
        own = dict((fixed or {}).get(method, {}))
        rows = [{**setting, **own} for setting in SETTINGS[method]]
        if method == "ddnn" and views and "ddnn_filters" not in own:
            rows.append({"raw": True, **own})
        for team in teams:
            for row in rows:
                settings = {**row, "device": team[0]} if method == "single" else row
                found[Candidate(method, team, tuple(sorted(settings.items())))] = None
    return tuple(found)
