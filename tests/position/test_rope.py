"""RoPE: a rotation whose effect on a score depends on the distance alone, in both layouts, equal to production."""

import math

import jaxtyping
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.position.rope import (
    apply_rope,
    apply_rope_interleaved,
    half_to_interleaved,
    interleaved_to_half,
    inverse_frequencies,
    rotations,
    turn,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYOUTS = [apply_rope, apply_rope_interleaved]


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def table(positions, d, *, base=10000.0, dtype=torch.float64):
    return rotations(torch.as_tensor(positions), inverse_frequencies(d, base=base).to(dtype))


def test_two_pairs_by_hand():
    # d = 4, base 100: pair 0 turns by 1 radian a position, pair 1 by 100^(-2/4) = 0.1. At position 10 the point (1, 0)
    # is turned by 10 radians to (cos 10, sin 10), and the point (0, 2) by 1 radian to (-2 sin 1, 2 cos 1).
    cos, sin = table([10], 4, base=100.0, dtype=torch.float32)
    a, b, c, d = math.cos(10), math.sin(10), -2 * math.sin(1), 2 * math.cos(1)
    half = apply_rope(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), cos, sin)  # pairs (0, 2) and (1, 3)
    torch.testing.assert_close(half, torch.tensor([[a, c, b, d]]))
    interleaved = apply_rope_interleaved(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), cos, sin)  # pairs (0, 1) and (2, 3)
    torch.testing.assert_close(interleaved, torch.tensor([[a, b, c, d]]))


@pytest.mark.parametrize(("base", "longest"), [(10000.0, 54_410), (500000.0, 2_559_000)])
def test_frequencies_of_llama(base, longest):
    # d = 128: pair i has frequency base^(-2i/128); the last, i = 63, a wavelength of 2 pi base^(126/128).
    frequencies = inverse_frequencies(128, base=base)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, torch.tensor([base ** (-2 * i / 128) for i in range(64)]))
    assert 2 * math.pi / frequencies[-1].item() == pytest.approx(longest, rel=1e-3)  # printed with four digits


def test_slow_pairs_never_come_round_in_the_trained_range():
    turns = 4096 * inverse_frequencies(128) / (2 * math.pi)
    assert int(turns[0]) == 651
    assert int((turns < 1).sum()) == 18


def test_turn_is_a_complex_multiplication():
    a, b, angle = randn(3, 7).unbind()
    x, y = turn(a, b, angle.cos(), angle.sin())
    torch.testing.assert_close(torch.complex(x, y), torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle))


def test_interleaved_equals_complex_numbers():
    x = randn(2, 3, 5, 8)
    points = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    angles = torch.arange(5)[:, None] * inverse_frequencies(8).double()
    expected = torch.view_as_real(points * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(apply_rope_interleaved(x, *table(range(5), 8)), expected)


def test_half_layout_is_the_interleaved_one_in_another_order():
    x, (cos, sin) = randn(2, 3, 5, 8), table(range(5), 8)
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # half channel i and i + 4 become neighbours
    torch.testing.assert_close(apply_rope(x, cos, sin)[..., order], apply_rope_interleaved(x[..., order], cos, sin))


def score(rope, q, k, m, n):
    """The score of a query at position m and a key at position n."""
    d = q.shape[-1]
    return (rope(q, *table([m], d)) @ rope(k, *table([n], d)).mT).squeeze()


@pytest.mark.parametrize("rope", LAYOUTS)
def test_a_score_depends_on_the_distance_alone(rope):
    q, k = randn(2, 1, 32).unbind()
    for m, n in [(0, 0), (5, 2), (2, 5), (40, 0)]:
        here = score(rope, q, k, m, n)
        for shift in (1, 17, 1000):
            # an angle of 1000 radians is rounded by 1e-13
            torch.testing.assert_close(score(rope, q, k, m + shift, n + shift), here, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rope", LAYOUTS)
def test_direction_distance_and_content_matter(rope):
    q, k = randn(2, 1, 32).unbind()
    here = score(rope, q, k, 5, 2)
    for other in (score(rope, q, k, 2, 5), score(rope, q, k, 6, 2), score(rope, q, randn(1, 32, seed=1), 5, 2)):
        assert (other - here).abs() > 0.1


def test_the_score_is_a_sum_over_pairs():
    # Re sum_i q_i conj(k_i) e^(i (m - n) theta_i), with q_i and k_i read as complex numbers
    q, k = randn(2, 1, 8).unbind()
    a, b = (torch.view_as_complex(x.view(4, 2)) for x in (q, k))
    angles = (7 - 3) * inverse_frequencies(8).double()
    expected = (a * b.conj() * torch.polar(torch.ones_like(angles), angles)).real.sum()
    torch.testing.assert_close(score(apply_rope_interleaved, q, k, 7, 3), expected)


@pytest.mark.parametrize("rope", LAYOUTS)
def test_a_rotation_keeps_lengths_and_can_be_undone(rope):
    x, (cos, sin) = randn(2, 3, 50, 16), table(range(50), 16)
    turned = rope(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rope(turned, cos, -sin), x)
    torch.testing.assert_close(turned[..., 0, :], x[..., 0, :], rtol=0, atol=0)  # position 0: by no angle
    assert (turned - x)[..., 1:, :].abs().amax(dim=-1).min() > 0.01  # all others move


@pytest.mark.parametrize("rope", LAYOUTS)
def test_each_sequence_of_a_batch_can_have_its_own_positions(rope):
    x, positions = randn(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 4], [7, 9, 30, 31, 100]])
    cos, sin = table(positions, 8)
    turned = rope(x, cos[:, None], sin[:, None])  # [b, 1, t, d/2]: the same for all heads
    for row in range(2):
        torch.testing.assert_close(turned[row], rope(x[row], *table(positions[row], 8)))


@pytest.mark.parametrize("rope", LAYOUTS)
def test_gradient_is_the_rotation_back(rope):
    x, (cos, sin), grad = randn(2, 5, 8).requires_grad_(), table(range(5), 8), randn(2, 5, 8, seed=1)
    (got,) = torch.autograd.grad(rope(x, cos, sin), x, grad)
    torch.testing.assert_close(got, rope(grad, cos, -sin))
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rope", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rope, dtype, device):
    x = randn(2, 300, 16, dtype=dtype, device=device)
    frequencies = inverse_frequencies(16, device=x.device)
    positions = torch.arange(300, device=device)
    turned = rope(x, *rotations(positions, frequencies))
    assert turned.dtype == dtype
    exact = rope(x.double(), *rotations(positions, frequencies.double()))
    # one rounding of the result, and angles up to 300 in float32: 300 * 2^-24 = 2e-5
    torch.testing.assert_close(turned.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-4)


def test_angles_stay_apart_far_out():
    # float32 rounds an angle of 131,071 radians by at most 2^-8: coarse, but far less than 1 radian, one position
    frequencies = inverse_frequencies(64)
    for got, exact in zip(table([131_071], 64, dtype=torch.float32), table([131_071], 64), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2**-8)
    cos, _ = rotations(torch.tensor([256, 257]), frequencies)
    assert (cos[0, 0] - cos[1, 0]).abs() > 0.1


def projected_scores(rope, wq, wk, x, heads=2):
    q, k = ((x @ w.mT).unflatten(-1, (heads, -1)).transpose(0, 1) for w in (wq, wk))
    cos, sin = table(range(len(x)), q.shape[-1])
    return rope(q, cos, sin) @ rope(k, cos, sin).mT


def test_converted_projections_give_the_same_scores():
    wq, wk, x = randn(16, 12), randn(16, 12, seed=1), randn(6, 12, seed=2)
    scores = projected_scores(apply_rope, wq, wk, x)
    converted = [half_to_interleaved(w, 2) for w in (wq, wk)]
    torch.testing.assert_close(projected_scores(apply_rope_interleaved, *converted, x), scores)
    # the usual mistake: a checkpoint of one layout turned by the code of the other
    assert (projected_scores(apply_rope_interleaved, wq, wk, x) - scores).abs().max() > 1


@pytest.mark.parametrize("shape", [(24, 5), (24,)], ids=["weight", "bias"])
def test_conversion_is_a_permutation_and_its_inverse(shape):
    w = randn(*shape)
    assert torch.equal(interleaved_to_half(half_to_interleaved(w, 3), 3), w)
    assert torch.equal(half_to_interleaved(interleaved_to_half(w, 3), 3), w)
    # the direction: in head 0 of size 8, half rows 0 and 4 are a pair and become interleaved rows 0 and 1
    assert torch.equal(half_to_interleaved(w, 3)[:4], w[[0, 4, 1, 5]])
    assert torch.equal(half_to_interleaved(w, 3)[8:10], w[[8, 12]])
    # Meta's checkpoint to Hugging Face's, as the conversion script writes it with views
    assert torch.equal(interleaved_to_half(w, 3), w.view(3, 4, 2, *shape[1:]).transpose(1, 2).reshape(shape))


class Results(TorchDispatchMode):
    """Watches every operation and lists those that make a new tensor of at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.numel and not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return result


def test_one_pass_without_a_negated_copy():
    x = randn(8, 10, 64, 32, dtype=torch.float32)
    cos, sin = table(range(64), 32, dtype=torch.float32)
    with Results(x.numel() // 2) as watch:
        apply_rope(x, cos, sin)
    assert watch.names == ["roll", "mul", "addcmul"]


def test_inputs_are_left_alone():
    inputs = randn(2, 5, 8), *table(range(5), 8)
    before = [x.clone() for x in inputs]
    for rope in LAYOUTS:
        rope(*inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_frequencies(5), "even and positive, got 5"),
        (lambda: inverse_frequencies(0), "even and positive, got 0"),
        (lambda: rotations(torch.arange(3), torch.ones(2, dtype=torch.bfloat16)), "float32 or float64.*got torch.bf"),
        (lambda: apply_rope(torch.ones(3, 8), torch.ones(3, 8), torch.ones(3, 8)), r"d/2 angles.*d=8, cos \(3, 8\)"),
        (lambda: apply_rope_interleaved(torch.ones(3, 8), torch.ones(3, 4), torch.ones(3, 2)), r"sin \(3, 2\)"),
        (lambda: half_to_interleaved(torch.ones(12, 4), 4), "even head size, got 12 rows, 4 heads"),
        (lambda: interleaved_to_half(torch.ones(12, 4), 5), "even head size, got 12 rows, 5 heads"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_equals_transformers_llama(base):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_type": "default", "rope_theta": base}
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=parameters))
    positions = torch.tensor([[0, 1, 2, 8190, 8191], [5, 6, 7, 8, 100_000]])
    q, k = randn(2, 4, 5, 64, dtype=torch.float32), randn(2, 2, 5, 64, seed=1, dtype=torch.float32)
    their_cos, their_sin = theirs(q, positions)
    frequencies = inverse_frequencies(64, base=base)
    cos, sin = rotations(positions, frequencies)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert torch.equal(cos, their_cos[..., :32])  # to the last bit: a trained model knows these angles
    assert torch.equal(sin, their_sin[..., :32])
    for got, expected in zip((q, k), apply_rotary_pos_emb(q, k, their_cos, their_sin), strict=True):
        torch.testing.assert_close(apply_rope(got, cos[:, None], sin[:, None]), expected)


def test_equals_transformers_deepseek_interleaved():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    q, k = randn(2, 4, 5, 8), randn(2, 1, 5, 8, seed=1)
    cos, sin = (x.expand(2, 5, 4) for x in table(range(5), 8))
    theirs = apply_rotary_pos_emb_interleave(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    for x, expected in zip((q, k), theirs, strict=True):  # they return the pairs' first halves, then the second ones
        torch.testing.assert_close(
            apply_rope_interleaved(x, cos[:, None], sin[:, None])[..., [0, 2, 4, 6, 1, 3, 5, 7]], expected
        )


@pytest.mark.parametrize("rope", LAYOUTS)
def test_compiles_to_one_graph(rope):
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    x, positions = randn(2, 3, 5, 8, dtype=torch.float32), torch.arange(5)

    def whole(x, positions):
        return rope(x, *rotations(positions, inverse_frequencies(8)))

    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, positions), whole(x, positions))
