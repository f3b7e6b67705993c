"""The decoder: equal to its parts put together by hand and to transformers; causal; the cache changes the cost only."""

import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.architecture.moe import softmax_gate
from minillm.architecture.norm import rms_norm_formula
from minillm.architecture.pretrained import load
from minillm.architecture.transformer import Cache, Config, Transformer, attend
from minillm.attention import naive
from minillm.data.corpus import document_mask, pack, positions
from minillm.measure import flops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# No two sizes are equal, and eps is large enough to be seen.
SMALL = dict(vocabulary=61, width=24, layers=3, heads=4, kv_heads=2, head_size=10, hidden=28, context=40, eps=1e-2)
VARIANTS = {
    "tied": {},
    "untied": dict(tied=False),
    "multi-head": dict(kv_heads=4),
    "multi-query": dict(kv_heads=1),
    "another base": dict(base=500.0),
    "qk norm": dict(qk_norm=True),
    "experts": dict(experts=5, active=2),
    "experts, raw weights": dict(experts=5, active=3, renormalise=False, qk_norm=True, tied=False),
}
TABLES = dict(rtol=1e-5, atol=1e-5)  # in float64: the angles are rounded to float32, 1e-7 of up to 40 radians


def randn(*shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def randint(high, *shape, seed=0, device="cpu"):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def build(*, dtype=torch.float32, device="cpu", **options):
    """A small model with weights large enough that every part of it shows in the logits, norms included."""
    model = Transformer(Config(**SMALL | options))
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            noise = randn(*weight.shape, seed=i)
            weight.copy_(0.3 * noise if weight.ndim > 1 else 1 + 0.3 * noise)
    return model.to(device, dtype)


def by_hand(model, ids, places=None, visible=None):
    """The logits again, from the oracles: scores, weights and rotations as the formulas have them, experts in loops."""
    c, d = model.config, model.config.head_size
    places = torch.arange(ids.shape[1]).expand(ids.shape) if places is None else places
    angles = places[..., None] * c.base ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones(()), angles.float()).to(torch.complex128)[:, None]  # b 1 t d/2

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        turned = torch.complex(a, b) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(x, block):
        q, k, v = (x @ block.qkv.T).split([c.heads * d, c.kv_heads * d, c.kv_heads * d], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
        if c.qk_norm:
            q, k = rms_norm_formula(q, block.q_norm, eps=c.eps), rms_norm_formula(k, block.k_norm, eps=c.eps)
        q, k = rotate(q), rotate(k)
        if visible is None:
            out = naive.attention(q, k, v, causal=True)
        else:
            k, v = (y.repeat_interleave(c.heads // c.kv_heads, dim=1) for y in (k, v))
            scores = (q @ k.mT / math.sqrt(d)).masked_fill(~visible[:, None], -math.inf)
            out = scores.softmax(dim=-1) @ v
        return out.transpose(1, 2).flatten(2) @ block.out.T

    def swiglu(x, gate_up, down):
        gate, up = (x @ gate_up.T).chunk(2, dim=-1)
        return (gate * torch.sigmoid(gate) * up) @ down.T

    def feedforward(x, block):
        if not c.experts:
            return swiglu(x, block.gate_up, block.down)
        weights, experts = softmax_gate((x @ block.moe.router.T).flatten(0, 1), c.active, renormalise=c.renormalise)
        gates = torch.zeros(len(weights), c.experts, dtype=x.dtype).scatter(1, experts, weights).view(*x.shape[:2], -1)
        each = [swiglu(x, *w) for w in zip(block.moe.gate_up, block.moe.down, strict=True)]
        return (torch.stack(each, dim=-1) * gates[:, :, None]).sum(dim=-1)

    x = model.embedding[ids]
    for block in model.blocks:
        x = x + attention(rms_norm_formula(x, block.attention_norm, eps=c.eps), block)
        x = x + feedforward(rms_norm_formula(x, block.feedforward_norm, eps=c.eps), block)
    head = model.embedding if c.tied else model.head
    return rms_norm_formula(x, model.norm, eps=c.eps) @ head.T


# put together by hand


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_equals_its_parts_put_together_forward_and_backward(options):
    model, ids = build(dtype=torch.float64, **options), randint(61, 2, 9)
    assert model.config.tied == (model.head is None)
    logits, expected = model(ids), by_hand(model, ids)
    torch.testing.assert_close(logits, expected, **TABLES)
    names, weights = zip(*model.named_parameters(), strict=True)
    grad = randn(*logits.shape, seed=1, dtype=torch.float64)
    pairs = zip(torch.autograd.grad(logits, weights, grad), torch.autograd.grad(expected, weights, grad), strict=True)
    for name, (ours, theirs) in zip(names, pairs, strict=True):
        # as TABLES; gradients sum over all tokens and are up to 100 in size
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_blocks_that_add_nothing_leave_the_embedding():
    # out and down are zero: embedding, norm, head. rms of (3, 4) is sqrt(12.5); times the weights (1, 2), times eye
    model = Transformer(Config(2, 2, 1, 1, 1, 2, 3, eps=0.0, tied=False))
    with torch.no_grad():
        model.embedding.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        model.norm.copy_(torch.tensor([1.0, 2.0]))
        model.head.copy_(torch.eye(2))
        model.blocks[0].out.zero_()
        model.blocks[0].down.zero_()
    expected = torch.tensor([[[3.0, 8.0]]]) / math.sqrt(12.5)
    torch.testing.assert_close(model(torch.tensor([[0]])), expected)


def test_a_fresh_model_knows_nothing_and_its_stream_does_not_grow_with_depth():
    torch.manual_seed(0)
    sizes = {}
    for layers in (2, 16):
        model = Transformer(
            Config(vocabulary=500, width=64, layers=layers, heads=2, kv_heads=1, head_size=32, hidden=172)
        )
        ids = randint(500, 8, 64)
        # 512 targets whose losses differ by 0.2 nats: their mean is within 0.05 of the loss of a blind guess
        assert F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() == pytest.approx(
            math.log(500), abs=0.05
        )
        x = model.embedding[ids]
        for block in model.blocks:
            x = block(x, model.cos[:64], model.sin[:64])
        sizes[layers] = x.std().item()
        assert model.blocks[0].qkv.std().item() == pytest.approx(0.02, rel=0.05)  # 6,000 draws: 1 % off is usual
        assert model.blocks[0].out.std().item() == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.05)
    assert sizes[16] == pytest.approx(sizes[2], rel=0.1)  # without the factor 1.4 times as large


# causal, relative, apart


def test_a_later_token_changes_no_earlier_logit():
    model, ids = build(), randint(61, 2, 30)
    other = ids.clone()
    other[:, 17:] = (other[:, 17:] + 1) % 61
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :17], after[:, :17])
    assert (before[:, 17:] != after[:, 17:]).any(dim=-1).all()


def test_only_distances_between_positions_count():
    model, ids = build(dtype=torch.float64), randint(61, 2, 9)
    places = torch.arange(9).expand(2, 9)
    torch.testing.assert_close(model(ids, positions=places + 31), model(ids), **TABLES)
    stretched = model(ids, positions=2 * places)
    assert (stretched - model(ids)).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, dict(qk_norm=True)], ids=["llama", "qwen3"])
def test_packed_documents_do_not_meet(options):
    model = build(**options)
    texts = [[3, 9, 27, 20], [50, 3], [1, 2, 4, 8, 16, 32], [5] * 30]
    rows = pack(texts, 15, eos=0)
    ids, numbers = rows.ids[:1], rows.documents[:1]
    assert numbers.tolist() == [[0] * 5 + [1] * 3 + [2] * 7]
    packed = dict(positions=positions(numbers), visible=document_mask(numbers))
    together = model(ids, **packed)
    for number, text in enumerate(texts[:3]):
        torch.testing.assert_close(together[numbers == number], model(torch.tensor([[*text, 0]]))[0])
    torch.testing.assert_close(together.double(), by_hand(model.double(), ids, *packed.values()), rtol=1e-4, atol=1e-4)


def test_a_document_has_no_gradient_in_another():
    model, numbers = build(tied=False), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    ids = torch.tensor([[1, 2, 3, 11, 12, 13, 14]])
    logits = model(ids, positions=positions(numbers), visible=document_mask(numbers))
    logits[:, 3:].square().sum().backward()
    used = model.embedding.grad.abs().amax(dim=1)
    assert used[11:15].min() > 0
    assert used[:11].max() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, dict(experts=4, tied=False)], ids=["dense", "experts"])
def test_left_padding_changes_nothing_for_what_is_real(options, device):
    model, ids = build(device=device, **options), randint(61, 1, 6, device=device)
    padded = F.pad(ids, (3, 0), value=60)
    real = (torch.arange(9, device=device) >= 3)[None]
    visible = real[:, None, :] & naive.visible(9, 9).to(device) | torch.eye(9, dtype=torch.bool, device=device)
    logits = model(padded, positions=(real.cumsum(dim=1) - 1).clamp(min=0), visible=visible)
    torch.testing.assert_close(logits[:, 3:], model(ids))


# the cache


def in_chunks(model, ids, sizes, **more):
    """The logits of the ids read in turns, the last one as long as it must be."""
    cache = Cache(model.config, len(ids), ids.shape[1], like=model.embedding)
    return torch.cat([model(part, cache=cache, **more) for part in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_cache_changes_no_logit(options, device):
    model, ids = build(device=device, **options), randint(61, 2, 14, device=device)
    with torch.no_grad():
        whole = model(ids)
        for sizes in ([14], [1] * 14, [5, 1, 1, 4, 3], [1, 13]):
            # half the default digits: products of other shapes add up in another order, through three layers
            torch.testing.assert_close(in_chunks(model, ids, sizes), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_with_padding_changes_no_logit():
    model, ids = build(), randint(61, 2, 12)
    real = torch.tensor([[False] * 4 + [True] * 8, [True] * 12])
    places = (real.cumsum(dim=1) - 1).clamp(min=0)
    visible = real[:, None, :] & naive.visible(12, 12) | torch.eye(12, dtype=torch.bool)
    whole, cache, start = model(ids, positions=places, visible=visible), Cache(model.config, 2, 12, like=ids.float()), 0
    for size in (6, 1, 1, 3, 1):
        end = start + size
        part = model(
            ids[:, start:end], cache=cache, positions=places[:, start:end], visible=visible[:, start:end, :end]
        )
        torch.testing.assert_close(part, whole[:, start:end], rtol=1e-4, atol=1e-4)  # as above
        start = end


class Rows(TorchDispatchMode):
    """Rows of the first operand of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(args[-2].shape[0])
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_a_decoding_step_projects_one_token_of_each_sequence():
    model, ids = build(), randint(61, 3, 20)
    cache = Cache(model.config, 3, 20, like=model.embedding)
    model(ids[:, :19], cache=cache)
    with Rows() as rows:
        model(ids[:, 19:], cache=cache)
    assert rows.seen == [3] * (4 * 3 + 1)  # qkv, out, gate and up, down of three layers; the head


@torch.no_grad()
def test_a_step_costs_two_operations_a_parameter_besides_the_scores():
    model, cache = build(), Cache(Config(**SMALL), 2, 20, like=torch.empty(()))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)  # tied: the head is the embedding
    model(randint(61, 2, 19), cache=cache)
    # PyTorch's counter leaves out the fused attention of a CPU
    assert flops(lambda: model(randint(61, 2, 1), cache=cache)) == 2 * 2 * matrices


@torch.no_grad()
def test_the_cache_is_allocated_once_and_handed_out_without_a_copy():
    model, ids = build(), randint(61, 2, 12)
    cache = Cache(model.config, 2, 12, like=model.embedding)
    places = cache.k.data_ptr(), cache.v.data_ptr()
    assert cache.k.shape == cache.v.shape == (3, 2, 2, 12, 10)
    for i, part in enumerate(ids.split(3, dim=1)):
        kept = cache.k[:, :, :, : cache.length].clone(), cache.v[:, :, :, : cache.length].clone()
        model(part, cache=cache)
        assert cache.length == 3 * (i + 1)
        assert places == (cache.k.data_ptr(), cache.v.data_ptr())
        for old, new in zip(kept, (cache.k, cache.v), strict=True):
            assert torch.equal(new[:, :, :, : 3 * i], old)
    cache.length = 4
    k, v = cache.extend(1, *torch.ones(2, 2, 2, 1, 10))
    assert k.shape == v.shape == (2, 2, 5, 10)
    assert (k.data_ptr(), v.data_ptr()) == (cache.k[1].data_ptr(), cache.v[1].data_ptr())


@torch.no_grad()
def test_a_shared_beginning_is_read_once():
    model, first, second = build(), randint(61, 1, 10), randint(61, 1, 9, seed=1)
    cache = Cache(model.config, 1, 20, like=model.embedding)
    model(torch.cat([first, randint(61, 1, 7, seed=2)], dim=1), cache=cache)
    cache.length = 10  # forget what came after the beginning
    logits = model(second, cache=cache)
    torch.testing.assert_close(
        logits, model(torch.cat([first, second], dim=1))[:, 10:], rtol=1e-4, atol=1e-4
    )  # as above


# numerics, other uses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, dict(experts=4)], ids=["dense", "experts"])
def test_half_precision_and_autocast_stay_near_float32(options, device):
    model, ids = build(device=device, **options), randint(61, 2, 12, device=device)
    exact = model(ids)
    with torch.autocast(device, torch.bfloat16):
        mixed = model(ids)
    half = model.bfloat16()(ids)
    assert half.dtype == mixed.dtype == torch.bfloat16
    for logits in (half, mixed):
        # three layers of numbers with 8 bits. A token that goes to another expert may change much, so not the maximum
        error = (logits.float() - exact).norm() / exact.norm()
        assert error < 0.05 if not options else error < 0.3
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(model, ids, [8, 1, 3])[:, 0], half[:, 0], rtol=0.05, atol=0.05)


def test_routings_are_those_of_the_layers():
    model, ids = build(experts=5, active=2), randint(61, 2, 9)
    routings = []
    model(ids, routings=routings)
    assert [routing.experts.shape for routing in routings] == [(18, 2)] * 3
    first = model.blocks[0]
    x = model.embedding[ids]  # the router of the first layer sees the stream after its attention
    x = x + first.attention(
        rms_norm_formula(x, first.attention_norm, eps=1e-2), model.cos[:9], model.sin[:9], None, None
    )
    logits = rms_norm_formula(x, first.feedforward_norm, eps=1e-2) @ first.moe.router.T
    torch.testing.assert_close(routings[0].logits, logits.flatten(0, 1))


@pytest.mark.parametrize("options", [{}, dict(qk_norm=True, tied=False)], ids=["llama", "qwen3"])
def test_compiles_to_one_graph(options):
    jaxtyping.config.update("jaxtyping_disable", True)  # its wrappers cannot be traced; the fixture puts it back
    torch.compiler.reset()  # the wrappers share one code object, which may be compiled eight times
    model, ids = build(layers=2, **options), randint(61, 2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(ids)
    torch.testing.assert_close(logits, model(ids))
    logits.square().sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


# production


def theirs(name, **more):
    """A small random model of transformers, with weights large enough that every part shows."""
    import transformers

    sizes = dict(hidden_size=24, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4, vocab_size=61)
    config = dict(num_key_value_heads=2, head_dim=10, max_position_embeddings=40, rms_norm_eps=1e-2, **sizes)
    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**config | tokens | more)
    )
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            noise = randn(*weight.shape, seed=i)
            weight.copy_(0.3 * noise if weight.ndim > 1 else 1 + 0.3 * noise)
    return model.eval()


MODELS = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", dict(tie_word_embeddings=True)),
    "Llama, another base": ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "Llama, multi-head": ("Llama", dict(num_key_value_heads=4)),
    "Qwen3": ("Qwen3", dict(tie_word_embeddings=True)),
    "Mixtral": ("Mixtral", dict(num_local_experts=5)),
    "Qwen3-MoE": ("Qwen3Moe", dict(num_local_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)),
    "Qwen3-MoE, renormalised": (
        "Qwen3Moe",
        dict(num_local_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, norm_topk_prob=True),
    ),
}


@pytest.mark.parametrize(("name", "options"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_equals_transformers(name, options, tmp_path):
    reference = theirs(name, **options)
    reference.save_pretrained(tmp_path)
    model, ids = load(tmp_path), randint(61, 2, 14)
    # float32 of both sides, three layers, other orders of adding up; logits are up to 30
    close = dict(rtol=1e-4, atol=1e-4)
    expected = reference(ids).logits
    torch.testing.assert_close(model(ids), expected, **close)
    torch.testing.assert_close(in_chunks(model, ids, [6, 1, 1, 5, 1]), expected, **close)
    past, out = None, []
    for part in ids.split([6, 1, 1, 5, 1], dim=1):
        step = reference(part, past_key_values=past, use_cache=True)
        past = step.past_key_values
        out.append(step.logits)
    torch.testing.assert_close(in_chunks(model, ids, [14]), torch.cat(out, dim=1), **close)
    real = torch.tensor([[False] * 5 + [True] * 9, [True] * 14])
    places = (real.cumsum(dim=1) - 1).clamp(min=0)
    padded = reference(ids, attention_mask=real.long(), position_ids=places).logits
    visible = real[:, None, :] & naive.visible(14, 14) | torch.eye(14, dtype=torch.bool)
    torch.testing.assert_close(model(ids, positions=places, visible=visible)[real], padded[real], **close)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_equal_those_of_transformers(tied, tmp_path):
    reference = theirs("Llama", tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    model, ids = load(tmp_path), randint(61, 2, 14)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, reference(ids, labels=ids).loss)
    loss.backward()
    reference(ids, labels=ids).loss.backward()
    close = dict(rtol=1e-4, atol=1e-5)  # float32 of both sides
    torch.testing.assert_close(model.embedding.grad, reference.model.embed_tokens.weight.grad, **close)
    first, layer = model.blocks[0], reference.model.layers[0]
    projections = [getattr(layer.self_attn, f"{x}_proj").weight.grad for x in "qkv"]
    torch.testing.assert_close(first.qkv.grad, torch.cat(projections), **close)
    torch.testing.assert_close(first.down.grad, layer.mlp.down_proj.weight.grad, **close)
    torch.testing.assert_close(first.attention_norm.grad, layer.input_layernorm.weight.grad, **close)


LLAMA_2_7B = dict(vocabulary=32000, width=4096, layers=32, heads=32, kv_heads=32, head_size=128, hidden=11008)
REAL = {  # from their config.json files; the numbers are transformers', counted below
    "Llama": (LLAMA_2_7B | dict(tied=False), 6_738_415_616),
    "Llama 70B": (
        LLAMA_2_7B | dict(width=8192, layers=80, heads=64, kv_heads=8, hidden=28672, tied=False),
        68_976_648_192,
    ),
    "Llama 3": (LLAMA_2_7B | dict(vocabulary=128256, kv_heads=8, hidden=14336, tied=False), 8_030_261_248),
    "Qwen3": (
        dict(vocabulary=151936, width=1024, layers=28, heads=16, kv_heads=8, head_size=128, hidden=3072, qk_norm=True),
        596_049_920,
    ),
    "Mixtral": (LLAMA_2_7B | dict(kv_heads=8, hidden=14336, experts=8, tied=False), 46_702_792_704),
}


@pytest.mark.parametrize(("name", "shape", "parameters"), [(name, *known) for name, known in REAL.items()])
def test_counts_of_real_models(name, shape, parameters):
    import transformers

    c = Config(**shape, context=128)
    family = name.split()[0]
    more = dict(num_local_experts=c.experts) if c.experts else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocabulary, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_size, intermediate_size=c.hidden, tie_word_embeddings=c.tied,
        pad_token_id=None, **more,
    )  # fmt: skip
    with torch.device("meta"):
        ours, reference = Transformer(c), getattr(transformers, f"{family}ForCausalLM")(config)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters()) == parameters


# refusals


def test_refuses_heads_that_cannot_be_grouped():
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        Config(heads=4, kv_heads=3)


def test_refuses_more_active_experts_than_there_are():
    with pytest.raises(ValueError, match="1 to 4, the number of experts, got 5"):
        Config(experts=4, active=5)


def test_refuses_an_odd_head_size():
    with pytest.raises(ValueError, match="must be even and positive, got 5"):
        Transformer(Config(**SMALL | dict(head_size=5)))


def test_refuses_more_tokens_than_the_context():
    model = build()
    model(randint(61, 1, 40))
    with pytest.raises(ValueError, match="context is 40 tokens, 41 are needed"):
        model(randint(61, 1, 41))
    cache = Cache(model.config, 1, 60, like=model.embedding)
    model(randint(61, 1, 39), cache=cache)
    with pytest.raises(ValueError, match="context is 40 tokens, 42 are needed"):
        model(randint(61, 1, 3), cache=cache)


def test_refuses_more_than_the_cache_holds():
    model = build()
    cache = Cache(model.config, 2, 5, like=model.embedding)
    with torch.no_grad():
        model(randint(61, 2, 5), cache=cache)
        with pytest.raises(ValueError, match="holds 5 tokens of 2 sequences, got 6 of 2"):
            model(randint(61, 2, 1), cache=cache)
        cache.length = 0
        with pytest.raises(ValueError, match="holds 5 tokens of 2 sequences, got 3 of 1"):
            model(randint(61, 1, 3), cache=cache)


def test_attend_equals_the_oracle_in_every_case():
    q, k, v = randn(2, 4, 3, 10), randn(2, 2, 7, 10, seed=1), randn(2, 2, 7, 10, seed=2)
    for t, s in ((3, 7), (1, 7), (1, 1), (3, 3)):
        expected = naive.attention(q[:, :, :t], k[:, :, :s], v[:, :, :s], causal=True)
        torch.testing.assert_close(attend(q[:, :, :t], k[:, :, :s], v[:, :, :s]), expected)
