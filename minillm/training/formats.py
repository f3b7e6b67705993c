"""Number formats by bit: what float32, TF32, float16, bfloat16 and the two float8 keep of a number.

Idea:        A number is a sign, an exponent field and a mantissa field: 1.mantissa x 2^(field - bias). The exponent's
             bits set the range, the mantissa's the precision: between two powers of two all numbers are equally far
             apart, and that distance, the ulp, doubles at each power. Field 0 has no leading 1 and the distance of
             field 1, so that numbers fade to zero evenly (subnormals); the last field is infinity and NaN. Read as
             integers the patterns count up through all numbers in order: rounding up past a power of two carries into
             the exponent by itself. bfloat16 has float32's range with 8 bits of precision, float16 11 bits and little
             range, TF32 the one's range with the other's precision.
Cost:        1 + exponent + mantissa bits a number; TF32 is how tensor cores read float32, and is stored in 32 bits.
Paper:       IEEE 754; Kalamkar et al. 2019, arXiv:1905.12322 (bfloat16); Micikevicius et al. 2022, arXiv:2209.05433,
             table 1 (E4M3 and E5M2).
Production:  the same bits as torch.float16, bfloat16, float8_e4m3fn and float8_e5m2, and numpy.float16.
Leaves out:  other rounding than to the nearest, formats with a shared scale (MX), integers.
"""

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    >>> [f"{f.name} {f.bits}" for f in FORMATS]
    ['fp32 32', 'tf32 19', 'bf16 16', 'fp16 16', 'e5m2 8', 'e4m3fn 8']
    >>> FP16.largest, FP16.smallest_normal, FP16.smallest_subnormal
    (65504.0, 6.103515625e-05, 5.960464477539063e-08)
    """

    name: str
    exponent: int  # bits
    mantissa: int  # bits that are stored
    infinities: bool = True  # False, "fn": the last exponent field is numbers, too, and its last pattern is NaN

    @cached_property
    def bits(self) -> int:
        """Of a number, the sign included."""
        return 1 + self.exponent + self.mantissa

    @cached_property
    def bias(self) -> int:
        """What the exponent's field is above the exponent."""
        return 2 ** (self.exponent - 1) - 1

    @cached_property
    def infinity(self) -> int:
        """The pattern after that of the largest number: infinity, or where there is none, NaN."""
        last = (2**self.exponent - 1) << self.mantissa
        return last if self.infinities else last | (2**self.mantissa - 1)

    @cached_property
    def nan(self) -> int:
        """A pattern that is no number."""
        return self.infinity | (1 << (self.mantissa - 1))

    @cached_property
    def largest(self) -> float:
        """The largest number."""
        return decode(self.infinity - 1, self)

    @cached_property
    def smallest_normal(self) -> float:
        """The smallest number above 0 of full precision."""
        return math.ldexp(1.0, 1 - self.bias)

    @cached_property
    def smallest_subnormal(self) -> float:
        """The smallest number above 0."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa)

    @cached_property
    def epsilon(self) -> float:
        """From 1 to the next number."""
        return math.ldexp(1.0, -self.mantissa)


FP32 = Format("fp32", exponent=8, mantissa=23)
TF32 = Format("tf32", exponent=8, mantissa=10)
BF16 = Format("bf16", exponent=8, mantissa=7)
FP16 = Format("fp16", exponent=5, mantissa=10)
E5M2 = Format("e5m2", exponent=5, mantissa=2)
E4M3FN = Format("e4m3fn", exponent=4, mantissa=3, infinities=False)
FORMATS = (FP32, TF32, BF16, FP16, E5M2, E4M3FN)


class Fields(NamedTuple):
    """A pattern taken apart. Printed it shows the bits."""

    sign: int
    exponent: int
    mantissa: int
    format: Format

    def __str__(self) -> str:
        return f"{self.sign} {self.exponent:0{self.format.exponent}b} {self.mantissa:0{self.format.mantissa}b}"


def fields(pattern: int, format: Format) -> Fields:
    """Sign, exponent's field and mantissa.

    >>> print(fields(encode(-6.5, FP16), FP16))                     # -1.625 x 2^2, and 2 + bias 15 = 0b10001
    1 10001 1010000000
    """
    if not 0 <= pattern < 2**format.bits:
        raise ValueError(f"a pattern of {format.name} is 0 to {2**format.bits - 1}, got {pattern}")
    exponent = (pattern >> format.mantissa) & (2**format.exponent - 1)
    return Fields(pattern >> (format.bits - 1), exponent, pattern & (2**format.mantissa - 1), format)


def decode(pattern: int, format: Format) -> float:
    """The number that a pattern of bits stands for.

    >>> decode(0b0_1111_110, E4M3FN), decode(0b0_00000_01, E5M2), decode(0b1_11111_00, E5M2)
    (448.0, 1.52587890625e-05, -inf)
    """
    sign, exponent, mantissa, _ = fields(pattern, format)
    size = pattern & (2 ** (format.bits - 1) - 1)
    if size >= format.infinity:
        value = math.inf if format.infinities and size == format.infinity else math.nan
    elif exponent == 0:
        value = math.ldexp(mantissa, 1 - format.bias - format.mantissa)
    else:
        value = math.ldexp(mantissa | (1 << format.mantissa), exponent - format.bias - format.mantissa)
    return -value if sign else value


def shift_to_even(number: int, places: int) -> int:
    """number / 2^places, rounded to the nearest integer; half way to the even one.

    >>> [shift_to_even(number, 2) for number in (4, 5, 6, 7, 8, 9, 10, 11)]         # 1, 1.25, 1.5, ... 2.75
    [1, 1, 2, 2, 2, 2, 2, 3]
    """
    if places <= 0:
        return number << -places
    kept, rest, half = number >> places, number & ((1 << places) - 1), 1 << (places - 1)
    return kept + (rest > half or (rest == half and kept % 2 == 1))


def encode(x: float, format: Format, *, saturate: bool = False) -> int:
    """The pattern of the number nearest to x, half way the one with an even pattern.

    Beyond the largest number, where rounding would give the next one, comes infinity, or NaN in a format without.
    `saturate` gives the largest number instead, as the cast to torch.float8_e4m3fn does, for infinity, too.

    >>> [decode(encode(x, BF16), BF16) for x in (1.0, 1.001, 1.004, 3e38, 1e-41)]   # steps of 2^-7 = 0.0078 after 1
    [1.0, 1.0, 1.0078125, 3.00405527047391e+38, 0.0]
    """
    sign = (math.copysign(1.0, x) < 0) << (format.bits - 1)
    if math.isnan(x):
        return sign | format.nan
    if math.isinf(x):
        return sign | (format.infinity - saturate)
    if x == 0:
        return sign
    fraction, power = math.frexp(x)  # |x| = 0.1... x 2^power
    digits = abs(int(math.ldexp(fraction, 53)))  # all of a Python float, |x| = digits x 2^(power - 53)
    exponent = max(power - 1, 1 - format.bias)  # subnormals have the distance of the smallest normal numbers
    steps = shift_to_even(digits, exponent - format.mantissa - (power - 53))  # |x| in ulps, the leading 1 included
    pattern = ((exponent - (1 - format.bias)) << format.mantissa) + steps  # that 1 makes the field one larger
    return sign | min(pattern, format.infinity - saturate)


def round_to(x: float, format: Format) -> float:
    """The nearest number of the format.

    >>> round_to(1e-8, FP16), round_to(65520.0, FP16), round_to(65519.0, FP16)
    (0.0, inf, 65504.0)
    """
    return decode(encode(x, format), format)


def ulp(x: float, format: Format) -> float:
    """The distance of the numbers of the format around x: from the largest one not above |x| to the next.

    An update below half of it is lost when it is added to x.

    >>> ulp(1.0, FP16), ulp(1.0, BF16), ulp(2048.0, FP16)
    (0.0009765625, 0.0078125, 2.0)
    """
    if not abs(x) <= format.largest:
        raise ValueError(f"{format.name} ends at {format.largest:g}, got {x:g}")
    power = math.frexp(x)[1] - 1 if x else 1 - format.bias
    return math.ldexp(1.0, max(power, 1 - format.bias) - format.mantissa)


def numbers(format: Format) -> list[float]:
    """All numbers of a format of at most 16 bits from 0 up, without infinity. ValueError: there are too many.

    >>> len(numbers(E4M3FN)), numbers(E4M3FN)[:4], numbers(E4M3FN)[-3:]
    (127, [0.0, 0.001953125, 0.00390625, 0.005859375], [384.0, 416.0, 448.0])
    """
    if format.bits > 16:
        raise ValueError(f"{format.name} has 2**{format.bits} patterns, list a format of at most 16 bits")
    return [decode(pattern, format) for pattern in range(format.infinity)]


def float32_bits(x: float) -> int:
    """The pattern of x as float32, from the machine: what `encode(x, FP32)` must give.

    >>> hex(float32_bits(1.0)), hex(encode(1.0, FP32))
    ('0x3f800000', '0x3f800000')
    """
    return int.from_bytes(struct.pack(">f", x), "big")
