"""Formats by bit: all patterns of the 8- and 16-bit ones against torch, rounding against torch, numpy and fractions."""

import math
import struct
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from minillm.training.formats import (
    BF16,
    E4M3FN,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    TF32,
    Format,
    decode,
    encode,
    fields,
    float32_bits,
    numbers,
    round_to,
    shift_to_even,
    ulp,
)

TORCH = {BF16: torch.bfloat16, FP16: torch.float16, E5M2: torch.float8_e5m2, E4M3FN: torch.float8_e4m3fn}
SMALL = pytest.mark.parametrize("format", TORCH, ids=lambda f: f.name)
FP64 = Format("fp64", exponent=11, mantissa=52)


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def torch_patterns(format):
    """All patterns, and their values by torch."""
    count = 2**format.bits
    whole = torch.arange(count, dtype=torch.int32).to(torch.uint8 if format.bits == 8 else torch.uint16)
    return range(count), whole.view(TORCH[format]).double().tolist()


def bits_by_torch(values, format):
    integer = torch.uint8 if format.bits == 8 else torch.uint16
    return values.to(TORCH[format]).view(integer).tolist()


@SMALL
def test_every_pattern_is_torchs_number(format):
    patterns, values = torch_patterns(format)
    assert all(same(decode(pattern, format), value) for pattern, value in zip(patterns, values, strict=True))


@SMALL
def test_every_number_has_its_own_pattern(format):
    patterns, values = torch_patterns(format)
    for pattern, value in zip(patterns, values, strict=True):
        if math.isnan(value):
            assert math.isnan(decode(encode(value, format), format))
        else:
            assert encode(value, format) == pattern


@SMALL
def test_rounding_is_torchs_at_and_around_every_half_way_point(format):
    """Half way between two neighbours, and the float32 just below and above it; both signs."""
    line = torch.tensor(numbers(format), dtype=torch.float64)
    pairs = torch.arange(0, len(line) - 1, 1 if format.bits == 8 else 13)  # 13: odd, and prime to powers of 2
    below, above = line[pairs], line[pairs + 1]
    middle = ((below + above) / 2).float()  # exact: one bit more than the format
    assert torch.equal(middle.double(), (below + above) / 2)
    up, down = (torch.nextafter(middle, torch.tensor(end)) for end in (math.inf, -math.inf))
    values = torch.cat([middle, up, down, -middle, -up, -down])
    saturate = format is E4M3FN
    mine = [encode(x, format, saturate=saturate) for x in values.tolist()]
    assert mine == bits_by_torch(values, format)


@SMALL
def test_overflow_is_torchs(format):
    last, step = format.largest, ulp(format.largest, format)
    edge = last + step / 2
    ends = [last, edge - step / 8, edge, edge + step / 8, last + step, 3e38, math.inf]
    values = torch.tensor([*ends, *(-x for x in ends)])
    saturate = format is E4M3FN
    mine = [encode(x, format, saturate=saturate) for x in values.tolist()]
    assert mine == bits_by_torch(values, format)


def test_overflow_by_hand():
    assert encode(464.0, E4M3FN) == 0x7E  # half way from 448 to 480, which would be pattern 0x7F: to the even one
    assert encode(464.1, E4M3FN) == 0x7F  # NaN: there is no infinity
    assert encode(464.1, E4M3FN, saturate=True) == encode(math.inf, E4M3FN, saturate=True) == 0x7E
    assert encode(-math.inf, E4M3FN) == 0xFF
    assert encode(61440.0, E5M2) == 0x7C  # half way from 57344, 0x7B, to 65536: to the even pattern, infinity
    assert encode(1e9, E5M2, saturate=True) == 0x7B
    assert encode(-1e9, FP16, saturate=True) == 0xFBFF


def test_float16_from_float64_is_rounded_once():
    generator = np.random.default_rng(0)
    values = generator.standard_normal(20000) * 2.0 ** generator.integers(-30, 20, 20000)
    # just above half way, by less than a float32 can say: by way of float32 it would go down to the even one
    values[0] = 1 + 2.0**-11 + 2.0**-40
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).view(np.uint16).tolist()
    assert [encode(x, FP16) for x in values.tolist()] == expected
    assert expected[0] != values[:1].astype(np.float32).astype(np.float16).view(np.uint16).item()


@pytest.mark.parametrize(("format", "code"), [(FP32, "f"), (FP64, "d")], ids=["fp32", "fp64"])
def test_wide_formats_are_the_machines(format, code):
    generator = np.random.default_rng(1)
    values = (generator.standard_normal(5000) * 2.0 ** generator.integers(-160, 120, 5000)).tolist()
    values += [0.0, -0.0, 1e-45, 7e-46, 2.0**-126, math.inf, -math.inf, format.largest, -format.smallest_subnormal]
    for x in values:
        pattern = int.from_bytes(struct.pack(f">{code}", x), "big")
        assert encode(x, format) == pattern
        assert same(decode(pattern, format), struct.unpack(f">{code}", struct.pack(f">{code}", x))[0])
    assert encode(1e-45, FP32) == 1 == float32_bits(1e-45)


def test_tf32_is_float32_with_13_bits_fewer():
    generator = np.random.default_rng(2)
    values = (generator.standard_normal(5000) * 2.0 ** generator.integers(-140, 120, 5000)).astype(np.float32)
    whole = values.view(np.uint32).astype(np.int64)
    size, rest = whole & ~0x1FFF, whole & 0x1FFF
    up = (rest > 0x1000) | ((rest == 0x1000) & ((whole >> 13) % 2 == 1))
    expected = (size + (up << 13)) >> 13
    assert [encode(x, TF32) for x in values.tolist()] == expected.tolist()
    assert [decode(p, TF32) for p in expected.tolist()] == (expected << 13).astype(np.uint32).view(np.float32).tolist()
    assert TF32.bits == 19


@SMALL
def test_limits_are_torchs(format):
    info = torch.finfo(TORCH[format])
    assert (format.bits, format.largest, format.epsilon) == (info.bits, info.max, info.eps)
    assert (format.smallest_normal, format.largest) == (info.smallest_normal, -info.min)
    one_up = torch.tensor([1], dtype=torch.uint8 if format.bits == 8 else torch.uint16).view(TORCH[format])
    assert format.smallest_subnormal == one_up.double().item()


def test_limits_of_the_wide_ones():
    info = torch.finfo(torch.float32)
    assert (FP32.largest, FP32.epsilon, FP32.smallest_normal) == (info.max, info.eps, info.smallest_normal)
    assert FP32.smallest_subnormal == 2.0**-149
    assert TF32.largest == struct.unpack(">f", bytes.fromhex("7f7fe000"))[0]
    assert (TF32.epsilon, TF32.smallest_normal) == (FP16.epsilon, FP32.smallest_normal)


@pytest.mark.parametrize("format", [BF16, FP16, E5M2, E4M3FN], ids=lambda f: f.name)
def test_ulp_is_the_distance_to_the_next_number(format):
    line = numbers(format)
    for a, b in pairwise(line):
        assert ulp(a, format) == ulp(-a, format) == b - a
        assert ulp((a + b) / 2, format) == b - a
    assert ulp(line[-1], format) == line[-1] - line[-2]


def test_ulp_of_the_python_float():
    for x in (1.0, 0.1, -3e300, 5e-324, 0.0, 2.0**-1022):
        assert ulp(x, FP64) == math.ulp(x)


@pytest.mark.parametrize("format", [BF16, FP16], ids=lambda f: f.name)
def test_an_update_of_less_than_half_an_ulp_is_lost(format):
    for x in (1.0, 1.5, 100.0, format.smallest_normal):
        step = ulp(x, format)
        assert round_to(x + 0.499 * step, format) == x
        assert round_to(x + 0.501 * step, format) == x + step


def test_shift_is_the_rounding_of_fractions():
    for number in range(200):
        for places in range(-2, 9):
            assert shift_to_even(number, places) == round(Fraction(number) / Fraction(2) ** places)


def test_fields_by_hand():
    assert str(fields(encode(0.15625, BF16), BF16)) == "0 01111100 0100000"  # 1.25 x 2^-3, and 127 - 3 = 124
    assert fields(encode(-448.0, E4M3FN), E4M3FN)[:3] == (1, 15, 6)
    assert str(fields(encode(2.0**-24, FP16), FP16)) == "0 00000 0000000001"


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_patterns_count_up_through_the_numbers(format):
    for pattern in (0, 1, 2**format.mantissa - 1, 2**format.mantissa, format.infinity - 2):
        low, high = decode(pattern, format), decode(pattern + 1, format)
        assert low < high
        assert high - low == ulp(low, format)
    assert math.isinf(decode(format.infinity, format)) == format.infinities
    assert math.isnan(decode(format.nan, format))


@pytest.mark.parametrize("pattern", [-1, 256])
def test_refuses_a_pattern_of_other_width(pattern):
    with pytest.raises(ValueError, match=f"a pattern of e5m2 is 0 to 255, got {pattern}"):
        decode(pattern, E5M2)


@pytest.mark.parametrize("x", [65505.0, math.inf, math.nan])
def test_refuses_the_ulp_of_what_is_no_number(x):
    with pytest.raises(ValueError, match="fp16 ends at 65504, got"):
        ulp(x, FP16)


def test_refuses_to_list_four_billion_numbers():
    with pytest.raises(ValueError, match=r"fp32 has 2\*\*32 patterns, list a format of at most 16 bits"):
        numbers(FP32)
