"""Offset copy: runs that share nothing, each encoding in its place, and what training at 32 is worth at 256."""

import math

import pytest
import torch

from minillm.position import copy_task
from minillm.position.copy_task import HEADS, LONGEST, MODELS, OFFSET, SYMBOLS, accuracy, bands, loss, train

RUNS = 3


def model(name, seed=0):
    return MODELS[name](RUNS, torch.Generator().manual_seed(seed))


def texts(t, *, n=2, runs=RUNS, seed=0):
    return torch.randint(SYMBOLS, (runs, n, t), generator=torch.Generator().manual_seed(seed))


def oracle(name, model, run, text):
    """Logits of one run on one text, head by head and query by query, in float64."""
    weights = {key: value[run].double() for key, value in model.named_parameters()}
    x, t = weights["symbols"][text], len(text)
    c = x.shape[-1]
    d = c // HEADS
    for m in range(t):
        if name == "learned":
            x[m] = x[m] + weights["places"][m]
        if name == "sinusoidal":
            for i in range(c // 2):
                angle = m / 10000 ** (2 * i / c)
                x[m, 2 * i : 2 * i + 2] += torch.tensor([math.sin(angle), math.cos(angle)])
    q, k, v = (x @ weights["qkv"] + weights["bias"]).split(c, dim=-1)
    rows = torch.zeros(t, c, dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * d, (head + 1) * d)
        for m in range(t):
            scores = []
            for n in range(m + 1):
                one, other = (y[part] for y in (q[m], k[n]))
                if name == "RoPE":  # complex numbers: channel i with channel i + d/2
                    one, other = (torch.complex(y[: d // 2], y[d // 2 :]) for y in (one, other))
                    angles = [(m - n) / 1e4 ** (2 * i / d) for i in range(d // 2)]
                    turns = [complex(math.cos(angle), math.sin(angle)) for angle in angles]
                    scores.append((one * other.conj() * torch.tensor(turns)).real.sum() / math.sqrt(d))
                else:
                    scores.append(one @ other / math.sqrt(d) - (m - n) * 16.0 ** -(head + 1) * (name == "ALiBi"))
            rows[m, part] = torch.stack(scores).softmax(dim=0) @ v[: m + 1, part]
    return rows @ weights["read"]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_run_equals_the_model_written_out(name):
    # ALiBi has two heads with slopes 2^-4 and 2^-8
    both, ids = model(name), texts(9)
    got = both(ids)
    for run in range(RUNS):
        expected = oracle(name, both, run, ids[run, 1])
        torch.testing.assert_close(got[run, 1].double(), expected, rtol=1e-4, atol=1e-4)  # float32, 32 channels


@pytest.mark.parametrize("name", MODELS)
def test_runs_share_nothing(name):
    both = model(name)
    loss(both, texts(12))[1].backward()
    for key, weight in both.named_parameters():
        assert weight.grad is None or not weight.grad[[0, 2]].any(), key
    assert both.qkv.grad[1].any()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_position_sees_what_comes_after_it(name):
    ids = texts(20)
    changed = ids.clone()
    changed[..., 12:] = (changed[..., 12:] + 1) % SYMBOLS
    now, then = model(name)(ids), model(name)(changed)
    torch.testing.assert_close(now[..., :12, :], then[..., :12, :])
    assert (now[..., 12:, :] - then[..., 12:, :]).abs().max() > 0.1


@pytest.mark.parametrize(("name", "relative"), [(name, name in ("RoPE", "ALiBi", "none")) for name in MODELS])
@torch.no_grad()
def test_in_a_window_a_relative_encoding_does_not_know_the_place(name, relative):
    ids = texts(20)
    whole, shorter = model(name)(ids, window=6)[..., -3:, :], model(name)(ids[..., 8:], window=6)[..., -3:, :]
    assert torch.allclose(whole, shorter, atol=1e-4) == relative  # float32 angles up to 20


@torch.no_grad()
def test_a_window_of_one_leaves_the_own_symbol():
    # the weights are 1 at the own position: the output is the value of the symbol, whatever stands before it
    one = model("RoPE")
    ids = texts(10)
    out = one(ids, window=1)
    values = (one.embed(ids) @ one.qkv[:, None] + one.bias[:, None])[..., -one.symbols.shape[-1] :]
    torch.testing.assert_close(out, values @ one.read[:, None], rtol=1e-4, atol=1e-5)


def test_loss_is_about_the_symbol_five_back():
    class Knows(copy_task.Copier):
        def forward(self, ids, *, window=None):
            wanted = ids.roll(OFFSET, dims=-1)  # the first five of a row have no wanted symbol
            wanted[..., :OFFSET] = 0
            return 50.0 * torch.nn.functional.one_hot(wanted, SYMBOLS)

    knows = Knows(RUNS, torch.Generator().manual_seed(0))
    assert loss(knows, texts(12)).max() < 1e-6
    assert torch.equal(accuracy(knows, texts=2), torch.ones(RUNS, LONGEST - OFFSET))
    ids = texts(12)
    assert loss(model("none"), ids).shape == (RUNS,)
    assert (loss(model("none"), ids) > 1).all()  # untrained: about log 16 = 2.8 or worse


def test_bands_by_hand():
    steps = torch.arange(OFFSET, LONGEST)
    levels = torch.tensor([1.0, 2.0, 3.0, 4.0])[(steps >= 32).long() + (steps >= 64) + (steps >= 128)]
    assert bands(torch.stack([levels, 2 * levels])).tolist() == [[1, 2, 3, 4], [2, 4, 6, 8]]


def test_the_same_seed_gives_the_same_models():
    one, other, third = (train("RoPE", runs=1, steps=3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.qkv, other.qkv)
    assert not torch.equal(one.qkv, third.qkv)


def test_rope_learns_the_task_fails_beyond_and_a_window_brings_it_back():
    # 30 runs: 1.00 where trained; 0.06-0.27 at positions 128-255, where guessing gives 0.06; 1.00 with the window
    rope = train("RoPE", runs=2)
    trained, _, _, far = bands(accuracy(rope, texts=8)).unbind(dim=1)
    assert trained.min() > 0.95
    assert far.max() < 0.6
    assert accuracy(rope, texts=8, window=32).mean() > 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train("nope"), "learned, sinusoidal, RoPE, ALiBi, none, got nope"),
        (lambda: model("none")(texts(6, runs=2)), "first axis holds the runs: 3, got 2"),
        (lambda: model("none")(texts(6), window=0), "window must be 1 or more, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
