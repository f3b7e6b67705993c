"""The exercise of position/rope: turn queries or keys by given angles, and its wrong versions."""

import torch

from minillm.study.checker import forbidden_ops, no_large_tensor
from minillm.study.exercise import Case, Exercise, Wrong

STUB = '''\
# exercise: position/rope
import torch


def apply_rope(x, cos, sin):
    """Queries or keys turned by their positions, in the half layout: channels i and i + d/2 are pair i.

    x is [..., t, d] with even d; cos and sin are [..., t, d/2], one angle a pair, and broadcast over
    the leading axes of x (texts, heads). The point (a, b) that pair i of a token is becomes
    (a cos_i - b sin_i, a sin_i + b cos_i), in the same two channels. Return [..., t, d] in the
    dtype of x: compute in the precision of the tables and round once, at the end. Products of
    numbers are enough: use no matrix products.
    """
    raise NotImplementedError
'''


def oracle(x, cos, sin):  # type: ignore[no-untyped-def]
    """Points as complex numbers in float64: turning is one multiplication."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def tables(positions: list[int], d: int, *, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [t, d/2] in float32."""
    frequencies = torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    angles = torch.tensor(positions)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def make_cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    padded = [torch.stack(pair)[:, None] for pair in zip(tables([0, 1, 2], 4), tables([0, 0, 1], 4), strict=True)]
    return [
        Case("one pair", (torch.tensor([[1.0, 0.0]]), *tables([1], 2)), {}, "the point (1, 0) by one radian"),
        Case("two pairs", (torch.tensor([[1.0, 0.0, 0.0, 2.0]]), *tables([10], 4, base=100.0)), {}, "a fast, a slow"),
        Case("position 0", (randn(1, 8), *tables([0], 8)), {}, "angles of zero: nothing may change"),
        Case("heads", (randn(2, 3, 5, 8), *tables([0, 1, 2, 3, 4], 8)), {}, "a batch of 2 with 3 heads"),
        Case("far out", (randn(2, 3, 64), *tables([4095, 8191, 131071], 64)), {}, "positions in a long context"),
        Case("positions of each text", (randn(2, 3, 3, 4), *padded), {}, "tables [2, 1, 3, 2]: one text is padded"),
        Case("half precision", (randn(2, 64, 16).bfloat16(), *tables(list(range(64)), 16)), {}, "a bfloat16 x"),
    ]


def long_inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(4, 64, 32, generator=generator), *tables(list(range(64)), 32)), {}


TURNED = "turned = torch.addcmul(x * torch.cat([cos, cos], dim=-1), swapped, torch.cat([-sin, sin], dim=-1))"

EXERCISE = Exercise(
    question="position/rope",
    module="position/rope",
    function="apply_rope",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("turned",),
    rtol=1e-5,  # two float32 products and a sum
    atol=1e-5,  # the sum may cancel
    wrong=(
        Wrong(
            "identity",
            "return turned.to(x.dtype)",
            "return x",
            "The input comes back unturned: without positions, scores do not know the distance.",
        ),
        Wrong(
            "sign missing",
            "torch.cat([-sin, sin], dim=-1)",
            "torch.cat([sin, sin], dim=-1)",
            "Both halves add the sine: that is no rotation, lengths change. The first half is a cos - b sin.",
        ),
        Wrong(
            "turned the other way",
            "torch.cat([-sin, sin], dim=-1)",
            "torch.cat([sin, -sin], dim=-1)",
            "The points turn by -m theta. Scores are still relative, but a checkpoint trained with the other "
            "direction reads its distances backwards.",
        ),
        Wrong(
            "neighbours paired with the tables of halves",
            "swapped = x.roll(x.shape[-1] // 2, dims=-1)",
            "swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)",
            "Channels 2i and 2i + 1 are taken as a pair, but cosines and signs are laid out for the pairs i and i + "
            "d/2: the two layouts are mixed.",
        ),
        Wrong(
            "tables interleaved",
            "torch.cat([cos, cos], dim=-1)",
            "cos.repeat_interleave(2, dim=-1)",
            "Each angle is repeated for neighbours, but in the half layout the partner of channel i is i + d/2.",
        ),
        Wrong(
            "cosine alone",
            TURNED,
            "turned = x * torch.cat([cos, cos], dim=-1)",
            "The sine part is missing: the channels are scaled, not turned.",
        ),
        Wrong(
            "position added",
            TURNED,
            "turned = x + torch.cat([sin, cos], dim=-1)",
            "The position is added, as sinusoidal encodings do: the score then has terms of content times position "
            "and is not relative.",
        ),
        Wrong(
            "result stays in float32",
            "return turned.to(x.dtype)",
            "return turned",
            "Half-precision inputs come back as float32, the dtype of the tables.",
        ),
        Wrong(
            "interleaved layout",
            TURNED,
            "turned = torch.stack(turn(x[..., 0::2], x[..., 1::2], cos, sin), dim=-1).flatten(-2)",
            "Channels 2i and 2i + 1 are turned as a pair: a right rotation, but of Meta's layout. Here the partner "
            "of channel i is i + d/2, and weights trained for one layout give wrong scores in the other.",
        ),
        Wrong(
            "interleaved pairs left in halves",
            TURNED,
            "turned = torch.cat(turn(x[..., 0::2], x[..., 1::2], cos, sin), dim=-1)",
            "Channels 2i and 2i + 1 are taken as a pair and the results are put into two halves: in the half layout "
            "pair i is channels i and i + d/2, before and after.",
        ),
        Wrong(
            "cosine and sine exchanged in use",
            TURNED,
            "turned = torch.addcmul(x * torch.cat([sin, sin], dim=-1), swapped, torch.cat([-cos, cos], dim=-1))",
            "Cosine and sine have changed places: position 0 is turned by 90 degrees instead of not at all.",
        ),
        Wrong(
            "tables rounded to half precision",
            TURNED,
            "cos, sin = cos.to(x.dtype), sin.to(x.dtype)\n"
            "    turned = x * torch.cat([cos, cos], dim=-1) + swapped * torch.cat([-sin, sin], dim=-1)",
            "The tables are rounded to the half precision of x before the products: compute in their precision and "
            "round the result once.",
        ),
    ),
    also_wrong=(
        Wrong(
            "exponent i/d",
            "torch.arange(0, d, 2, dtype=torch.float32, device=device) / d",
            "torch.arange(d // 2, dtype=torch.float32, device=device) / d",
            "The exponent of pair i is 2i/d; with i/d the slowest pair has the square root of its wavelength.",
        ),
        Wrong(
            "wavelengths for frequencies",
            "return 1.0 / base **",
            "return base **",
            "Frequencies fall with i: base^(-2i/d), not base^(2i/d).",
        ),
        Wrong(
            "cosine and sine exchanged",
            "return angles.cos(), angles.sin()",
            "return angles.sin(), angles.cos()",
            "The cosine comes first; exchanged, position 0 is turned by 90 degrees.",
        ),
        Wrong(
            "positions from 1",
            "angles = positions[..., None] * frequencies",
            "angles = (positions[..., None] + 1) * frequencies",
            "The first position is 0 and is not turned. Scores do not show it, a mixed cache does.",
        ),
        Wrong(
            "angles in half precision",
            "angles = positions[..., None] * frequencies",
            "angles = (positions[..., None] * frequencies).bfloat16().to(frequencies.dtype)",
            "bfloat16 has 8 bits: from position 256 on neighbours get the same angle.",
        ),
        Wrong(
            "pair turned the other way",
            "return a * cos - b * sin, a * sin + b * cos",
            "return a * cos + b * sin, b * cos - a * sin",
            "That is a turn by minus the angle.",
        ),
        Wrong(
            "interleaved result left in halves",
            "cos, sin), dim=-1).flatten(-2)",
            "cos, sin), dim=-2).flatten(-2)",
            "The turned pairs are put one after the other instead of back in their places.",
        ),
        Wrong(
            "conversion backwards",
            '"(h two n) ... -> (h n two) ..."',
            '"(h n two) ... -> (h two n) ..."',
            "Half layout holds (two, n) in each head; interleaved holds (n, two).",
        ),
        Wrong(
            "conversion without heads",
            '"(h two n) ... -> (h n two) ...", h=heads',
            '"(h two n) ... -> (h n two) ...", h=1',
            "The reordering happens inside each head, not across the whole projection.",
        ),
        Wrong(
            "sine and cosine exchanged",
            "torch.stack([sin, cos], dim=-1)",
            "torch.stack([cos, sin], dim=-1)",
            "Even channels hold sines, odd ones cosines.",
            module="position/sinusoidal",
        ),
        Wrong(
            "sines before cosines",
            "torch.stack([sin, cos], dim=-1)",
            "torch.stack([sin, cos], dim=-2)",
            "The paper alternates sine and cosine; all sines before all cosines is another order of channels.",
            module="position/sinusoidal",
        ),
        Wrong(
            "sines only",
            "torch.stack([sin, cos], dim=-1)",
            "torch.stack([sin, sin], dim=-1)",
            "Without the cosine a shift is no longer a rotation, and the product of two encodings is not relative.",
            module="position/sinusoidal",
        ),
        Wrong(
            "base ignored",
            "inverse_frequencies(c, base=base, device",
            "inverse_frequencies(c, device",
            "The argument `base` has no effect.",
            module="position/sinusoidal",
        ),
        Wrong(
            "positions from 1, sinusoidal",
            "rotations(positions, inverse",
            "rotations(positions + 1, inverse",
            "Position 0 is sin 0 = 0 and cos 0 = 1.",
            module="position/sinusoidal",
        ),
        Wrong(
            "exponent i/c",
            "inverse_frequencies(c, base=base, device=positions.device)",
            "inverse_frequencies(2 * c, base=base, device=positions.device)[: c // 2]",
            "The exponent of pair i is 2i/c, not i/c.",
            module="position/sinusoidal",
        ),
        Wrong(
            "wavelengths for frequencies, sinusoidal",
            "rotations(positions, inverse_frequencies(",
            "rotations(positions, 1 / inverse_frequencies(",
            "The position is divided by base^(2i/c), not multiplied.",
            module="position/sinusoidal",
        ),
        Wrong(
            "bonus for distance",
            "return (-slopes(h,",
            "return (slopes(h,",
            "The bias grows with the distance: far keys are preferred. The slope is subtracted.",
            module="position/alibi",
        ),
        Wrong(
            "future not hidden",
            ".masked_fill(distance < 0, -math.inf)",
            "",
            "Later keys have a negative distance and get a bonus: the causal mask is missing.",
            module="position/alibi",
        ),
        Wrong(
            "own position hidden",
            "distance < 0, -math.inf",
            "distance <= 0, -math.inf",
            "A query sees itself: distance 0 is allowed.",
            module="position/alibi",
        ),
        Wrong(
            "aligned at the start",
            "i = torch.arange(s - t, s, device=device)[:, None]",
            "i = torch.arange(t, device=device)[:, None]",
            "With a cache the last query stands at the last key: positions of queries start at s - t.",
            module="position/alibi",
        ),
        Wrong(
            "one slope for all heads",
            "-slopes(h, device=device)[:, None, None]",
            "-slopes(h, device=device).mean().expand(h)[:, None, None]",
            "Every head has a slope of its own.",
            module="position/alibi",
        ),
        Wrong(
            "slopes start at 1",
            "exponents = torch.arange(1, n + 1, device=device) / n",
            "exponents = torch.arange(n, device=device) / n",
            "The first slope is 2^(-8/h), not 1.",
            module="position/alibi",
        ),
        Wrong(
            "one sequence for every number of heads",
            "n = 2 ** (h.bit_length() - 1)",
            "n = h",
            "If h is not a power of two, published models take the slopes of the next lower power and then every "
            "other one of twice as many heads.",
            module="position/alibi",
        ),
        Wrong(
            "slopes in equal steps",
            "return 2.0 ** (-8 * torch.cat([exponents, between]))",
            "return torch.cat([exponents, between])",
            "Slopes are a geometric sequence, not an arithmetic one.",
            module="position/alibi",
        ),
        Wrong(
            "all of the finer slopes",
            "between = torch.arange(1, 2 * n, 2, device=device)[: h - n] / (2 * n)",
            "between = torch.arange(1, 2 * n + 1, device=device)[: h - n] / (2 * n)",
            "Of the slopes of 2n heads every second one is new; the others are there already.",
            module="position/alibi",
        ),
        Wrong(
            "squared distance",
            "[:, None, None] * distance)",
            "[:, None, None] * distance * distance.abs())",
            "The penalty is linear in the distance.",
            module="position/alibi",
        ),
        Wrong(
            "loss one place off",
            "logits = model(ids)[..., OFFSET:, :]",
            "logits = model(ids)[..., OFFSET - 1 : -1, :]",
            "The logits at position m are about the symbol at m - OFFSET.",
            module="position/copy_task",
        ),
        Wrong(
            "window one too wide",
            ".tril(-window)",
            ".tril(-window - 1)",
            "A window of w holds the query's own position and w - 1 before it.",
            module="position/copy_task",
        ),
        Wrong(
            "values turned too",
            "self.turn(k), v, attn_mask",
            "self.turn(k), self.turn(v), attn_mask",
            "Only queries and keys are turned; turned values would carry the place into the output.",
            module="position/copy_task",
        ),
        Wrong(
            "keys not turned",
            "self.turn(q), self.turn(k)",
            "self.turn(q), k",
            "A score knows the distance only if both sides are turned.",
            module="position/copy_task",
        ),
    ),
    probes=(
        no_large_tensor(
            long_inputs,
            2 * 4 * 64 * 32,
            "A tensor of more than twice the size of x was built: a rotation matrix is nearly all zeros, two products "
            "and a sum for each channel are enough.",
        ),
        forbidden_ops(
            long_inputs,
            ("mm", "matmul", "einsum"),
            "The numbers are right, but a matrix product made them: a cos - b sin and a sin + b cos, number by number, "
            "is all that is asked.",
        ),
    ),
    hints=(
        "Split x into its first and its second half: these are all the a, and all the b, of the d/2 pairs.",
        "The first half becomes a cos - b sin, the second a sin + b cos; cos and sin have the shape of one half.",
        "Put the two halves one after the other with torch.cat, so that every channel is where it was.",
        "The tables are float32, so the products are too: turn the result back into x.dtype at the very end.",
    ),
)
