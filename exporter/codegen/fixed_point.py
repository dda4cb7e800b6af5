"""The integer arithmetic that TFLite-Micro and the generated C share, as plain Python integers.

Real factors become a 31-bit multiplier and a power of two (Jacob et al. 2018, section 2.2; the
rounding is gemmlowp's: doubling high product to nearest, halves up, then a right shift to nearest,
halves away from zero). Tables of element-wise operators are computed here, at export.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Multiplier:
    """A positive real factor: multiplier / 2^31 * 2^shift.

    Attributes:
        multiplier: In [2^30, 2^31), or 0.
        shift: Negative shifts right.
    """

    multiplier: int
    shift: int

    @classmethod
    def of(cls, real: float) -> Multiplier:
        """The nearest multiplier of a real factor (a double), as TensorFlow Lite chooses it."""
        if real == 0.0:
            return cls(0, 0)
        fraction, shift = math.frexp(real)
        multiplier = round_half_away(fraction * 2**31)
        if multiplier == 2**31:
            multiplier, shift = multiplier // 2, shift + 1
        if shift < -31:
            return cls(0, 0)
        return cls(multiplier, shift)

    def times(self, value: int) -> int:
        """The product of an int32, rounded twice."""
        left, right = max(self.shift, 0), max(-self.shift, 0)
        return shift_right(high_product(wrapped(value << left), self.multiplier), right)


def round_half_away(value: float) -> int:
    """Nearest integer, halves away from zero: C's round()."""
    return math.floor(value + 0.5) if value >= 0 else -math.floor(-value + 0.5)


def wrapped(value: int) -> int:
    """An integer as a 32-bit register holds it."""
    return (value + 2**31) % 2**32 - 2**31


def high_product(a: int, b: int) -> int:
    """(a * b) / 2^31 to nearest, halves up, saturated."""
    return min((a * b + 2**30) >> 31, INT32_MAX)


def shift_right(value: int, bits: int) -> int:
    """Value / 2^bits to nearest, halves away from zero."""
    if bits == 0:
        return value
    return int((value + (1 << (bits - 1)) - (value < 0)) >> bits)


def saturating_shift_left(value: int, bits: int) -> int:
    """Value * 2^bits, saturated to int32."""
    return max(-(2**31), min(value << bits, INT32_MAX))


def input_radius(integer_bits: int, left_shift: int) -> int:
    """Largest distance from zero whose scaled value still fits Q(integer_bits).(31-...)."""
    most = (2.0**integer_bits - 1.0) * 2.0 ** (31 - integer_bits - left_shift)
    return math.floor(most)


def _q0(real: Fraction) -> int:
    return round(real * 2**31)


# exp(-2^k) for the bits of Q5.26, from 1/4 to 16, as Q0.31.
_EXP_FACTORS = tuple(
    (26 + exponent, round(math.exp(-(2.0**exponent)) * 2**31)) for exponent in range(-2, 5)
)
_EXP_MINUS_EIGHTH = round(math.exp(-0.125) * 2**31)
_ONE_THIRD = _q0(Fraction(1, 3))


def exp_of_negative(value: int, integer_bits: int) -> int:
    """exp(value) of value <= 0 in fixed point; the result is Q0.31.

    A quarter at a time: a Taylor polynomial of fourth order around -1/8 on [-1/4, 0), then one
    factor for each bit of the rest.

    Args:
        value: With `integer_bits` integer and 31 - integer_bits fractional bits.
        integer_bits: 4 or 5.
    """
    if value == 0:
        return INT32_MAX
    fraction_bits = 31 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    rest = (value & (quarter - 1)) - quarter
    result = _exp_in_quarter(wrapped(rest << integer_bits))
    steps = rest - value
    for position, factor in _EXP_FACTORS:
        bit = position - 26 + fraction_bits
        if bit < 31 and position - 26 < integer_bits and steps & (1 << bit):
            result = high_product(result, factor)
    return result


def _exp_in_quarter(value: int) -> int:
    x = value + (1 << 28)
    x2 = high_product(x, x)
    x3 = high_product(x2, x)
    x4 = high_product(x2, x2)
    quarter_of_x4 = shift_right(x4, 2)
    tail = shift_right(high_product(quarter_of_x4 + x3, _ONE_THIRD) + x2, 1)
    return min(_EXP_MINUS_EIGHTH + high_product(_EXP_MINUS_EIGHTH, x + tail), INT32_MAX)


def _reciprocal_of_one_plus(value: int) -> int:
    """1 / (1 + x) of x in [0, 1], Q0.31: three Newton steps from 48/17 - 32/17 * (1 + x) / 2."""
    half_denominator = (value + INT32_MAX + 1) // 2
    x = wrapped(
        round(Fraction(48, 17) * 2**29) + high_product(half_denominator, -round(2**29 * 32 / 17))
    )
    for _ in range(3):
        rest = (1 << 29) - high_product(half_denominator, x)
        x = wrapped(x + saturating_shift_left(high_product(x, rest), 2))
    return saturating_shift_left(x, 1)


def logistic(value: int) -> int:
    """1 / (1 + exp(-x)) of x in Q4.27; the result is Q0.31."""
    if value == 0:
        return 1 << 30
    positive = _reciprocal_of_one_plus(exp_of_negative(-abs(value), 4))
    return positive if value > 0 else INT32_MAX - positive


def logistic_table(scale: float, zero_point: int) -> list[int]:
    """The int8 logistic function of every int8 value; the output counts 1/256 from -128.

    Args:
        scale: The input's.
        zero_point: The input's.
    """
    fraction, shift = math.frexp(scale * 2.0**27)
    multiplier = Multiplier(round_half_away(fraction * 2**31), shift)
    radius = input_radius(4, shift)
    table = []
    for value in range(-128, 128):
        centred = value - zero_point
        if centred <= -radius:
            table.append(-128)
        elif centred >= radius:
            table.append(127)
        else:
            q0 = logistic(multiplier.times(centred))
            table.append(max(-128, min(shift_right(q0, 23) - 128, 127)))
    return table


def exponential_table(scale: float, beta: float) -> list[int]:
    """exp(beta * scale * -d) as Q0.31 for d = 0, 1, 2 ..., as far as softmax counts it at all.

    Returns:
        At most 256 entries: differences beyond the last one count as 0.
    """
    real = min(beta * scale * 2.0**26, 2.0**31 - 1.0)
    fraction, shift = math.frexp(real)
    multiplier = round_half_away(fraction * 2**31)
    if multiplier == 2**31:
        multiplier, shift = multiplier // 2, shift + 1
    if shift < 0:
        multiplier, shift = 0, 0
    entries = min(255, input_radius(5, shift)) + 1
    return [
        exp_of_negative(high_product(wrapped(-d * 2**shift), multiplier), 5) for d in range(entries)
    ]


def requantized_table(
    factor: float, in_zero: int, out_zero: int, low: int = -128, high: int = 127
) -> list[int]:
    """round((value - in_zero) * factor) + out_zero of every int8 value, clamped."""
    multiplier = Multiplier.of(factor)
    return [
        max(low, min(multiplier.times(value - in_zero) + out_zero, high))
        for value in range(-128, 128)
    ]
