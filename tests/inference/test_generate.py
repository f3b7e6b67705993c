"""Generation: the tokens of a model that reads everything again each time, for rows of unequal length, but cheaper."""

import pytest
import torch

from minillm.architecture.pretrained import save
from minillm.architecture.transformer import Cache, Config, Transformer
from minillm.inference.generate import generate, greedy, pad_left, padded_mask, padded_positions, stream
from minillm.inference.layout import for_decoding
from minillm.inference.sampling import draw, temperature

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SMALL = dict(vocabulary=61, width=24, layers=2, heads=4, kv_heads=2, head_size=10, hidden=28, context=40)
PROMPTS = [[3, 9, 27, 20], [50], [1, 2, 4, 8, 16, 32, 3]]


def build(*, device="cpu", **options):
    """A model whose most likely tokens are far from the next ones: another order of adding up does not swap them."""
    torch.manual_seed(0)
    model = Transformer(Config(**SMALL | options))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + (weight.ndim == 1))
    return model.to(device)


@torch.no_grad()
def again_and_again(model, prompt, new_tokens):
    """The oracle: the whole text through the model for each token."""
    ids = torch.tensor([prompt], device=model.embedding.device)
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, dict(qk_norm=True, tied=False), dict(experts=4)], ids=["llama", "qwen3", "moe"]
)
def test_equals_reading_everything_again(options, device):
    model = build(device=device, **options)
    for prompt in PROMPTS:
        new = generate(model, torch.tensor([prompt], device=device), new_tokens=12)
        assert new.tolist() == [again_and_again(model, prompt, 12)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, dict(experts=4)], ids=["dense", "experts"])
def test_left_padding_changes_no_row(options, device):
    model = build(device=device, **options)
    ids, real = (x.to(device) for x in pad_left(PROMPTS))
    new = generate(model, ids, new_tokens=12, real=real)
    assert new.tolist() == [again_and_again(model, prompt, 12) for prompt in PROMPTS]
    assert torch.equal(generate(model, ids.masked_fill(~real, 60), new_tokens=12, real=real), new)


def test_padding_by_hand():
    ids, real = pad_left([[5], [6, 7, 8]], pad=9)
    assert ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert real.tolist() == [[False, False, True], [True, True, True]]
    assert padded_positions(real).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert padded_mask(real).int().tolist() == [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]


def test_stop_ends_a_row_and_then_everything():
    model = build()
    ids, real = pad_left(PROMPTS)
    free = generate(model, ids, new_tokens=12, real=real)
    stop = free[1, 4].item()  # the second row says it, at the latest after five tokens
    ends = [row.tolist().index(stop) if stop in row else 12 for row in free]
    steps = 0

    def pick(logits):
        nonlocal steps
        steps += 1
        return greedy(logits)

    new = generate(model, ids, new_tokens=12, real=real, stop=stop, pick=pick)
    assert steps == new.shape[1] == min(12, max(ends) + 1)
    assert len(set(ends)) > 1
    for row, without, end in zip(new.tolist(), free.tolist(), ends, strict=True):
        assert row[: end + 1] == without[: len(row)][: end + 1]
        assert set(row[end:]) <= {stop}
    alone = generate(model, torch.tensor([PROMPTS[1]]), new_tokens=12, stop=stop)
    assert alone.tolist() == [free[1, : ends[1] + 1].tolist()]


def test_tokens_come_one_by_one():
    model, ids = build(), torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    calls = []

    def pick(logits):
        calls.append(logits)
        return greedy(logits)

    steps = stream(model, ids, new_tokens=5, pick=pick)
    assert calls == []
    first = next(steps)
    assert len(calls) == 1
    assert first.shape == (2,)
    assert calls[0].shape == (2, 61)
    rest = list(steps)
    assert len(calls) == 5
    assert torch.equal(torch.stack([first, *rest], dim=1), generate(model, ids, new_tokens=5))


def test_a_step_reads_one_token_a_row_and_the_head_one_position(monkeypatch):
    model, shapes, products = build(), [], []
    hidden, linear = model.hidden, torch.nn.functional.linear
    monkeypatch.setattr(model, "hidden", lambda ids, **more: (shapes.append(tuple(ids.shape)), hidden(ids, **more))[1])
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, w: (products.append((w is model.embedding, x.shape[:-1].numel())), linear(x, w))[1],
    )
    ids, real = pad_left(PROMPTS)
    generate(model, ids, new_tokens=6, real=real)
    assert shapes == [(3, 7)] + [(3, 1)] * 5  # the last token is not read any more
    assert [rows for head, rows in products if head] == [3] * 6
    assert {rows for head, rows in products if not head} == {21, 3}


def test_the_cache_is_as_long_as_needed_and_made_once(monkeypatch):
    made = []
    real = Cache.__init__

    def init(self, *args, **more):
        made.append((args[1:], self))
        real(self, *args, **more)

    monkeypatch.setattr(Cache, "__init__", init)
    generate(build(), torch.tensor(PROMPTS[:1]), new_tokens=6)
    assert [sizes for sizes, _ in made] == [(1, 10)]
    assert made[0][1].length == 9


def test_draws_are_repeated_with_the_seed():
    model, ids = build(), torch.tensor([PROMPTS[0]] * 4)

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, ids, new_tokens=10, pick=lambda x: draw(temperature(x, 5.0), generator=generator))

    one = sample(0)
    assert torch.equal(one, sample(0))
    assert not torch.equal(one, sample(1))
    assert len({tuple(row) for row in one.tolist()}) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_generates_and_picks_from_float32(device):
    model, kinds = build(device=device).bfloat16(), set()
    ids, real = (x.to(device) for x in pad_left(PROMPTS))
    new = generate(model, ids, new_tokens=5, real=real, pick=lambda x: (kinds.add(x.dtype), greedy(x))[1])
    assert kinds == {torch.float32}
    assert new.shape == (3, 5)
    assert new.min() >= 0
    assert new.max() < 61


def test_what_is_generated_can_be_trained_on():
    model = build()
    new = generate(model, torch.tensor(PROMPTS[:1]), new_tokens=5)
    model(new).sum().backward()  # tensors of inference mode could not be saved for this
    assert model.embedding.grad is not None


def test_a_laid_out_copy_gives_the_same_tokens():
    model = build()
    ids, real = pad_left(PROMPTS)
    expected = generate(model, ids, new_tokens=12, real=real)
    assert torch.equal(generate(for_decoding(model, batch=3), ids, new_tokens=12, real=real), expected)


@pytest.mark.parametrize(
    "options", [dict(tied=False), dict(qk_norm=True), dict(experts=4)], ids=["llama", "qwen3", "mixtral"]
)
def test_equals_transformers_generate(options, tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(**options)
    ids, real = pad_left(PROMPTS)
    stop = generate(model, ids, new_tokens=12, real=real)[0, 6].item()
    save(model, tmp_path, more={"eos_token_id": stop, "pad_token_id": 0})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = theirs.generate(ids, attention_mask=real.long(), max_new_tokens=12, do_sample=False, pad_token_id=stop)
    new = generate(model, ids, new_tokens=12, real=real, stop=stop)
    assert torch.equal(new, expected[:, ids.shape[1] :])


# refusals


def test_refuses_more_than_the_context():
    model, ids = build(), torch.ones(1, 30, dtype=torch.long)
    assert generate(model, ids, new_tokens=10).shape == (1, 10)
    with pytest.raises(ValueError, match="context is 40 tokens, the prompt of 30 and 11 new ones are more"):
        generate(model, ids, new_tokens=11)


def test_refuses_empty_prompts():
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt needs at least one token"):
            pad_left(prompts)
    with pytest.raises(ValueError, match="at least 1 token each, got 0 and 3"):
        generate(build(), torch.ones(1, 0, dtype=torch.long), new_tokens=3)
    with pytest.raises(ValueError, match="at least 1 token each, got 2 and 0"):
        generate(build(), torch.ones(1, 2, dtype=torch.long), new_tokens=0)


@pytest.mark.parametrize("real", [[True, False, True], [True, True, False], [False, False, False], [True, True]])
def test_refuses_padding_that_is_not_on_the_left(real):
    with pytest.raises(ValueError, match="padding must stand on the left"):
        generate(build(), torch.ones(1, 3, dtype=torch.long), new_tokens=3, real=torch.tensor([real]))
