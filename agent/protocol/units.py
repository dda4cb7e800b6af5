"""Numbers with units as people write them: "500 kB", "100 Mbit/s", "9 ms"."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

BYTES: Mapping[str, float] = {
    "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
BITS_PER_S: Mapping[str, float] = {"bit/s": 1, "kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9}
MILLISECONDS: Mapping[str, float] = {"us": 1e-3, "ms": 1, "s": 1e3, "min": 60e3}

_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z/]+)\s*")


def parse_quantity(text: object, units: Mapping[str, float]) -> float:
    """The value of "number unit" in the base unit of `units`.

    Raises:
        ValueError: not a number followed by one of the units; the message lists them.
    """
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is not None and match[2] in units:
        value = float(match[1]) * units[match[2]]
        if math.isfinite(value):
            return value
    given = repr(text)
    given = given if len(given) <= 60 else f"{given[:57]}..."
    hint = ""
    if match is not None and match[2] not in units:
        spelt = {unit.lower(): unit for unit in reversed(list(units))}
        close = difflib.get_close_matches(match[2].lower()[:20], spelt, n=1, cutoff=0.6)
        hint = f" (did you mean '{match[1]} {spelt[close[0]]}'?)" if close else ""
    raise ValueError(f"expected a number with a unit ({', '.join(units)}), got {given}{hint}")


def format_bytes(count: int) -> str:
    """Bytes for people, decimal as budgets are: 612352 -> '612.4 kB'."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.99995 * size:  # 999 960 B are 1.0 MB, not 1000.0 kB
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


class _Quantity:
    """Reads "number unit" into the base unit; a bare number is refused: its unit is a guess."""

    def __init__(self, units: Mapping[str, float], example: str, *, whole: bool) -> None:
        self.units, self.example, self.whole = units, example, whole

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        names = "|".join(re.escape(unit) for unit in self.units)
        pattern = rf"^\s*[0-9]+(\.[0-9]+)?\s*({names})\s*$"
        return {"type": "string", "pattern": pattern, "examples": [self.example]}

    def _read(self, value: object) -> float:
        quantity = parse_quantity(value, self.units)
        return round(quantity) if self.whole else quantity


Bytes = Annotated[int, _Quantity(BYTES, "500 kB", whole=True), Field(gt=0)]
BitsPerSecond = Annotated[float, _Quantity(BITS_PER_S, "100 Mbit/s", whole=False), Field(gt=0)]
Milliseconds = Annotated[float, _Quantity(MILLISECONDS, "9 ms", whole=False), Field(ge=0)]
