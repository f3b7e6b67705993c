"""Optimizers: the numbers of PyTorch's own over many steps, and what each claims of itself."""

import io
import math

import pytest
import torch

from minillm.architecture.transformer import Config, Transformer
from minillm.training import optimizers
from minillm.training.optimizers import (
    Adafactor,
    AdamW,
    Muon,
    adafactor_step,
    adamw_step,
    decay_groups,
    hidden_matrices,
    muon_step,
    orthogonalise,
    outer_estimate,
    rms,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MATRICES = [(8, 5), (5, 16), (12, 12), (1, 7)]
ANY = [*MATRICES, (6,), (2, 4, 5)]


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def weights(shapes, *, dtype=torch.float32, device="cpu"):
    return [randn(*shape, seed=i, dtype=dtype, device=device).requires_grad_() for i, shape in enumerate(shapes)]


def follow(optimizer, parameters, steps=25, *, size=1.0):
    """The weights after steps with gradients that are the same for every optimizer and change in size."""
    for step in range(steps):
        for i, weight in enumerate(parameters):
            scale = size * 10 ** math.sin(step + i)
            weight.grad = scale * randn(*weight.shape, seed=1000 * i + step, dtype=weight.dtype, device=weight.device)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + step % 3)  # a schedule
        optimizer.step()
    return [weight.detach().clone() for weight in parameters]


PAIRS = {
    "adamw": (ANY, lambda p: AdamW(p, weight_decay=0.1), lambda p: torch.optim.AdamW(p, weight_decay=0.1)),
    "adamw without decay, other betas": (
        ANY,
        lambda p: AdamW(p, weight_decay=0.0, betas=(0.8, 0.95), eps=1e-3),
        lambda p: torch.optim.AdamW(p, weight_decay=0.0, betas=(0.8, 0.95), eps=1e-3),
    ),
    "adamw against adam": (ANY, lambda p: AdamW(p, weight_decay=0.0), lambda p: torch.optim.Adam(p)),
    "adamw against the fused kernel": (ANY, AdamW, lambda p: torch.optim.AdamW(p, fused=True)),
    "adafactor": (ANY, Adafactor, torch.optim.Adafactor),
    "adafactor with decay": (
        ANY,
        lambda p: Adafactor(p, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
    ),
}
MUON = {
    "default": (Muon, torch.optim.Muon),
    "momentum, no decay": (
        lambda p: Muon(p, momentum=0.5, weight_decay=0.0),
        lambda p: torch.optim.Muon(p, momentum=0.5, weight_decay=0.0),
    ),
    "sized like adam": (
        lambda p: Muon(p, like_adam=True),
        lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw"),
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pair", PAIRS)
def test_equals_torch_over_25_steps(pair, dtype, device):
    shapes, mine, theirs = PAIRS[pair]
    ours, reference = (weights(shapes, dtype=dtype, device=device) for _ in range(2))
    for a, b in zip(follow(mine(ours), ours), follow(theirs(reference), reference), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pair", MUON)
def test_muon_equals_torch_over_25_steps(pair, device):
    mine, theirs = MUON[pair]
    ours, reference = (weights(MATRICES, device=device) for _ in range(2))
    for a, b in zip(follow(mine(ours), ours), follow(theirs(reference), reference), strict=True):
        # both multiply in bfloat16, where another order of adding changes a product by up to 2^-8 of itself: an update
        # of 0.03 by 1e-4, and 25 of them by no more than 25 times as much
        torch.testing.assert_close(a, b, rtol=0, atol=2.5e-3)


# AdamW


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_the_first_step_of_adam_is_lr_whatever_the_gradient(size):
    weight = torch.zeros(50, dtype=torch.float64)
    noise = randn(50, dtype=torch.float64)
    grad = size * (noise + 0.1 * noise.sign())
    adamw_step(weight, grad, torch.zeros_like(weight), torch.zeros_like(weight), 1, lr=0.01)
    torch.testing.assert_close(
        weight, -0.01 * grad.sign(), rtol=1e-3, atol=0
    )  # eps: 1e-8 beside gradients of 1e-4 and more


def test_decay_alone_shrinks_by_the_sum_of_rates():
    # no gradient: the weight is multiplied by 1 - lr decay each step, about exp(-sum of lr x decay)
    weight = torch.ones(1).requires_grad_()
    optimizer = AdamW([weight], weight_decay=0.1)
    for step in range(1000):
        weight.grad = torch.zeros(1)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 1000)
        optimizer.step()
    assert weight.item() == pytest.approx(math.exp(-0.1 * 0.01 * 500.5), rel=1e-3)


def test_decay_is_apart_from_the_gradient():
    # L2 in the gradient would be divided by its size and vanish beside large gradients
    weight, grad = torch.full((1,), 4.0), torch.full((1,), 1e6)
    adamw_step(weight, grad, torch.zeros(1), torch.zeros(1), 1, lr=0.1, weight_decay=0.5)
    assert weight.item() == pytest.approx(4 * 0.95 - 0.1)


def test_half_precision_weights_and_states():
    (weight,) = weights([(4, 4)], dtype=torch.bfloat16)
    before = weight.detach().clone()
    optimizer = AdamW([weight], 0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.dtype == torch.bfloat16
    assert (before - weight).abs().max() > 0.05


# Adafactor


def test_outer_estimate_is_exact_for_rank_one():
    squares = randn(6, 1).square() * randn(1, 4, seed=1).square()
    estimate = outer_estimate(squares.mean(dim=-1, keepdim=True), squares.mean(dim=-2, keepdim=True))
    torch.testing.assert_close(estimate, squares)


def test_adafactor_steps_relative_to_the_weight():
    # gradient of rank 1: every entry of the update is 1, and the step is lr times the root mean square of the weight
    for size in (1.0, 100.0):
        weight = size * torch.ones(3, 4, dtype=torch.float64)
        grad = 7 * randn(3, 1, dtype=torch.float64) * randn(1, 4, seed=1, dtype=torch.float64)
        squares = torch.zeros(3, 1, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
        adafactor_step(weight, grad, squares, 1, lr=0.01)
        torch.testing.assert_close(weight, size * (1 - 0.01 * grad.sign()))


def test_adafactor_clips_a_sudden_update():
    weight, squares = torch.zeros(4), (torch.full((4,), 1e-6),)
    adafactor_step(weight, torch.ones(4), squares, 100, lr=1.0, smallest=1.0)
    # mean square 1e-6 + (1 - 1e-6) 100^-0.8 = 0.0251: the update would be 6.3, and is brought to 1; rate 1 / sqrt(100)
    torch.testing.assert_close(weight, torch.full((4,), -0.1))


def test_numbers_kept():
    weight = torch.zeros(30, 70)
    kept = {cls: cls([weight.requires_grad_()]).begin(weight) for cls in (AdamW, Adafactor, Muon)}
    numbers = {}
    for cls, state in kept.items():
        tensors = [x for value in state.values() for x in (value if isinstance(value, tuple) else [value])]
        numbers[cls] = sum(x.numel() for x in tensors)
    assert numbers == {AdamW: 2 * 30 * 70, Adafactor: 30 + 70, Muon: 30 * 70}


# Muon


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (3, 16, 24)])
def test_orthogonalised_singular_values_and_vectors(shape):
    matrix = randn(*shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u * s.clamp(min=0.05 * s.max()).unsqueeze(-2) @ v  # smaller ones need more than 5 steps
    out = orthogonalise(matrix, dtype=torch.float64)
    values = torch.linalg.svdvals(out)
    assert 0.65 < values.min() < values.max() < 1.25
    inside = u.mT @ out @ v.mT  # diagonal where the singular vectors are the same
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)))


def test_orthogonalise_does_not_see_the_scale():
    matrix = randn(6, 9)
    out = orthogonalise(matrix, dtype=torch.float32)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(orthogonalise(scale * matrix, dtype=torch.float32), out, rtol=1e-4, atol=1e-5)
    assert orthogonalise(torch.zeros(6, 9)).abs().max() == 0


def test_a_stack_is_the_same_as_one_after_the_other():
    stack = randn(3, 8, 5)
    alone = [orthogonalise(matrix, dtype=torch.float32) for matrix in stack]
    torch.testing.assert_close(orthogonalise(stack, dtype=torch.float32), torch.stack(alone))


def test_orthogonalise_multiplies_in_bfloat16_unless_told():
    assert orthogonalise(randn(4, 4)).dtype == torch.bfloat16
    assert orthogonalise(randn(4, 4), dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("shape", [(64, 64), (64, 16), (16, 64)])
def test_size_of_the_muon_step(shape):
    def step(**options):
        weight = torch.zeros(shape)
        muon_step(weight, randn(*shape), torch.zeros(shape), lr=1.0, dtype=torch.float32, **options)
        return rms(weight)

    r, c = shape
    # singular values of 0.7 to 1.2, and smaller where the matrix is nearly singular
    assert step() == pytest.approx(math.sqrt(max(1, r / c) / max(r, c)), rel=0.25)
    assert step(like_adam=True) == pytest.approx(0.2, rel=0.25)


def test_muon_moves_rare_directions_as_much_as_frequent_ones():
    grad = torch.diag(torch.tensor([1.0, 0.05]))
    weight = torch.zeros(2, 2)
    muon_step(weight, grad, torch.zeros(2, 2), lr=1.0, dtype=torch.float32)
    assert weight[1, 1] / weight[0, 0] > 0.5


# Classes


@pytest.mark.parametrize("cls", [AdamW, Adafactor, Muon])
def test_a_saved_state_goes_on_the_same(cls):
    straight = weights([(6, 4)])
    expected = follow(cls(straight), straight, 10)
    first = weights([(6, 4)])
    optimizer = cls(first)
    follow(optimizer, first, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [weight.detach().clone().requires_grad_() for weight in first]
    resumed = cls(second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(5, 10):
        second[0].grad = 10 ** math.sin(step) * randn(6, 4, seed=step)
        resumed.param_groups[0]["lr"] = 0.01 * (1 + step % 3)
        resumed.step()
    assert second[0].equal(expected[0])


@pytest.mark.parametrize("cls", [AdamW, Adafactor, Muon])
def test_a_weight_without_gradient_stays(cls):
    used, unused = weights([(3, 3), (3, 3)])
    before = unused.detach().clone()
    optimizer = cls([used, unused])
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert unused.equal(before)
    assert len(optimizer.state) == 1


def test_the_step_functions_are_what_the_classes_call(monkeypatch):
    called = []
    for name in ("adamw_step", "adafactor_step", "muon_step"):
        monkeypatch.setattr(optimizers, name, lambda *a, name=name, **k: called.append(name))
    for cls in (AdamW, Adafactor, Muon):
        (weight,) = weights([(3, 3)])
        weight.grad = torch.ones_like(weight)
        cls([weight]).step()
    assert called == ["adamw_step", "adafactor_step", "muon_step"]


# Which weights


def test_hidden_matrices_are_those_inside_blocks_without_routers():
    config = Config(vocabulary=32, width=16, layers=2, heads=2, kv_heads=1, head_size=8, hidden=24, tied=False)
    model = Transformer(config)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, others = ([names[id(p)] for p in part] for part in hidden_matrices(model))
    assert matrices == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out", "gate_up", "down")]
    assert {"embedding", "head", "norm"} < set(others)
    assert len(matrices) + len(others) == len(names)
    sparse = Transformer(Config(vocabulary=32, width=16, layers=1, heads=2, kv_heads=1, head_size=8, experts=4))
    names = {id(p): name for name, p in sparse.named_parameters()}
    matrices, others = ([names[id(p)] for p in part] for part in hidden_matrices(sparse))
    assert "blocks.0.moe.router" in others
    assert "blocks.0.moe.gate_up" in matrices


def test_only_matrices_decay():
    model = Transformer(Config(vocabulary=32, width=16, layers=1, heads=2, kv_heads=1, head_size=8, hidden=24))
    decays, stays = decay_groups(model, 0.1)
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decays["params"])
    assert all(p.ndim == 1 for p in stays["params"])
    both = [*decays["params"], *stays["params"]]
    assert sorted(map(id, both)) == sorted(map(id, model.parameters()))


# Refusals


@pytest.mark.parametrize("cls", [AdamW, Adafactor, Muon])
def test_refuses_to_go_uphill(cls):
    with pytest.raises(ValueError, match=r"must not be negative, got -0\.1"):
        cls([torch.zeros(2, 2, requires_grad=True)], -0.1)


def test_refuses_vectors_in_muon():
    with pytest.raises(ValueError, match=r"needs matrices, got a parameter of shape \(3,\)"):
        Muon([torch.zeros(3, requires_grad=True)])
