"""The decoder: causal, equal to its parts composed by hand, exact with a cache, with padding and packed documents."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.architecture.norm import rms_norm_formula
from minillm.architecture.transformer import Cache, Config, Transformer
from minillm.attention import naive
from minillm.position.rope import apply_rope, inverse_frequencies, rotations

SMALL = Config(vocabulary=50, width=24, layers=2, heads=4, kv_heads=2, head_size=8, hidden=40, context=32)


def model(config=SMALL, seed=0):
    torch.manual_seed(seed)
    made = Transformer(config).double()
    for parameter in made.parameters():  # large weights: a wrong term shows
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made.eval()


def ids(b=2, t=11, seed=1):
    return torch.randint(0, 50, (b, t), generator=torch.Generator().manual_seed(seed))


def by_hand(made, tokens):
    """The same decoder from the naive pieces: one head at a time, no fused projection, no shared table."""
    c = made.config
    h, g, d, f = c.heads, c.kv_heads, c.head_size, c.hidden
    x = made.embedding[tokens]
    frequencies = inverse_frequencies(d, base=c.base)
    cos, sin = (a.double() for a in rotations(torch.arange(tokens.shape[1]), frequencies))
    for block in made.blocks:
        y = rms_norm_formula(x, block.attention_norm, eps=c.eps)
        q, k, v = (y @ w.T for w in block.qkv.split([h * d, g * d, g * d]))
        q, k, v = (z.unflatten(-1, (-1, d)).transpose(1, 2) for z in (q, k, v))
        out = naive.attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, causal=True)
        x = x + out.transpose(1, 2).flatten(2) @ block.out.T
        y = rms_norm_formula(x, block.feedforward_norm, eps=c.eps)
        gate, up = (y @ w.T for w in block.gate_up.split([f, f]))
        x = x + (F.silu(gate) * up) @ block.down.T
    return rms_norm_formula(x, made.norm, eps=c.eps) @ made.embedding.T


def test_equals_its_parts_composed_by_hand():
    made = model()
    torch.testing.assert_close(made(ids()), by_hand(made, ids()), rtol=1e-5, atol=1e-5)  # the rotation table is float32


def test_a_later_token_changes_no_earlier_logit():
    made, a = model(), ids()
    b = a.clone()
    b[:, 6] = (b[:, 6] + 1) % 50
    before, after = made(a), made(b)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=-1).min() > 1e-6


@pytest.mark.parametrize("config", [SMALL, Config(**{**vars(SMALL), "qk_norm": True, "tied": False})])
@pytest.mark.parametrize("cuts", [(11,), (5, 6), (3, 1, 1, 4, 2), (1,) * 11])
def test_a_cache_gives_the_logits_of_the_whole_sequence(config, cuts):
    made = model(config)
    cache = Cache(config, 2, 16, like=made.embedding)
    address = cache.k.data_ptr()
    parts = [made(piece, cache=cache) for piece in ids().split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), made(ids()), rtol=1e-9, atol=1e-9)
    assert cache.length == 11
    assert cache.k.data_ptr() == address  # allocated once


def test_a_decoding_step_projects_one_token(monkeypatch):
    made = model()
    cache = Cache(SMALL, 1, 16, like=made.embedding)
    made(ids(1, 8), cache=cache)
    rows, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, *more: rows.append(x.shape[-2]) or linear(x, *more))
    made(ids(1, 1), cache=cache)
    assert set(rows) == {1}


def test_packed_documents_do_not_see_each_other():
    made, tokens = model(), ids(1, 10)
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    same = documents[:, None] == documents
    visible = (same & torch.ones(10, 10, dtype=torch.bool).tril())[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    packed = made(tokens, positions=positions, visible=visible)
    torch.testing.assert_close(packed[:, :4], made(tokens[:, :4]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 4:], made(tokens[:, 4:]), rtol=1e-9, atol=1e-9)
    embedded = made.embedding.detach()[tokens].requires_grad_()
    x = embedded
    cos, sin = made.cos[positions].unsqueeze(1).double(), made.sin[positions].unsqueeze(1).double()
    for block in made.blocks:
        x = block(x, cos, sin, None, visible)
    (gradient,) = torch.autograd.grad(x[:, 4:].sum(), embedded)
    assert gradient[:, :4].abs().max() == 0  # not small: exactly nothing flows between documents


def test_an_untied_head_is_another_weight():
    tied, untied = Transformer(SMALL), Transformer(Config(**{**vars(SMALL), "tied": False}))
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 24


def test_the_first_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    made = Transformer(Config(vocabulary=1000, width=128, layers=4, heads=4, kv_heads=2, head_size=32, hidden=256))
    tokens = torch.randint(0, 1000, (8, 64))
    loss = F.cross_entropy(made(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(1000)) < 0.15  # weights of 0.02 give logits of a few tenths


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        # Llama 2 7B and Llama 3 8B as their checkpoints count them
        (dict(vocabulary=32000, width=4096, layers=32, heads=32, kv_heads=32, hidden=11008), 6_738_415_616),
        (dict(vocabulary=128256, width=4096, layers=32, heads=32, kv_heads=8, hidden=14336), 8_030_261_248),
    ],
)
def test_parameters_of_real_models(shape, parameters):
    with torch.device("meta"):
        made = Transformer(Config(**shape, head_size=128, tied=False, context=8))
    assert sum(p.numel() for p in made.parameters()) == parameters


def test_mixture_reports_its_routing():
    made = model(Config(**{**vars(SMALL), "experts": 4}))
    routings = []
    made(ids(), routings=routings)
    assert [r.experts.shape for r in routings] == [(22, 2)] * 2


def test_refuses_more_than_the_context_and_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="context is 32 tokens, 33 are needed"):
        model()(ids(1, 33))
    made = model()
    with pytest.raises(ValueError, match="the cache holds 4 tokens of 1 sequences, got 5 of 1"):
        made(ids(1, 5), cache=Cache(SMALL, 1, 4, like=made.embedding))
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        Config(heads=4, kv_heads=3)
