"""Generation: the same tokens as transformers, as without a cache, with prompts of unequal length, and as a stream."""

import pytest
import torch
import transformers

from minillm.architecture.pretrained import load
from minillm.inference.generate import generate, greedy, pad_left, stream

PROMPTS = [[5, 17, 3, 8, 2], [11], [9, 4, 30]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small Llama of transformers with large random weights, and ours from its files."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return load(folder), theirs


def test_equals_transformers_with_left_padding(models):
    ours, theirs = models
    ids, real = pad_left(PROMPTS)
    expected = theirs.generate(ids, attention_mask=real.long(), max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(ours, ids, new_tokens=12, real=real), expected[:, ids.shape[1] :])


def test_padding_changes_nothing(models):
    ours, _ = models
    ids, real = pad_left(PROMPTS)
    together = generate(ours, ids, new_tokens=10, real=real)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert torch.equal(row, generate(ours, torch.tensor([prompt]), new_tokens=10)[0])


@torch.no_grad()
def test_equals_recomputing_the_whole_text(models):
    ours, _ = models
    ids = torch.tensor([PROMPTS[0]])
    for token in stream(ours, ids, new_tokens=15):
        assert torch.equal(token, greedy(ours(ids)[:, -1]))
        ids = torch.cat([ids, token[:, None]], dim=1)


def test_a_row_ends_at_its_stop_token(models):
    ours, _ = models
    free = generate(ours, torch.tensor([PROMPTS[0]]), new_tokens=12)[0].tolist()
    stop = free[4]
    first = free.index(stop)
    ended = generate(ours, torch.tensor([PROMPTS[0]]), new_tokens=12, stop=stop)[0].tolist()
    assert ended == free[: first + 1]
    ids, real = pad_left(PROMPTS)
    rows = generate(ours, ids, new_tokens=12, real=real, stop=stop)
    for row in rows.tolist():
        if stop in row:
            assert set(row[row.index(stop) :]) == {stop}


def test_a_stream_can_be_left_early(models):
    ours, _ = models
    tokens = stream(ours, torch.tensor([PROMPTS[0]]), new_tokens=50)
    assert [next(tokens).shape for _ in range(3)] == [(1,)] * 3


def test_refusals(models):
    ours, _ = models
    with pytest.raises(ValueError, match="at least one token"):
        pad_left([[1], []])
    with pytest.raises(ValueError, match="context is 64"):
        generate(ours, torch.tensor([PROMPTS[0]]), new_tokens=60)
