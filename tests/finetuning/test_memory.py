"""The estimator: against bytes measured on real steps of our model, and against published figures."""

import itertools
from dataclasses import replace
from math import prod

import pytest
import torch

from minillm.architecture import transformer
from minillm.architecture.transformer import Config
from minillm.finetuning import measured
from minillm.finetuning.adam8bit import AdamW8bit
from minillm.finetuning.lora import MATRICES
from minillm.finetuning.memory import (
    Job,
    Memory,
    activations,
    block_tensors,
    budget,
    checkpointed,
    estimate,
    fits,
    gathered,
    gpt_layer,
    last_norm,
    logits_peak,
    measured_states,
    saved_bytes,
    saved_tensors,
    shapes,
    state_bytes,
    states,
    weight_counts,
)
from minillm.measure import peak_memory

SMALL = Config(vocabulary=50, width=64, layers=3, heads=4, kv_heads=2, head_size=10, hidden=96, context=64)
WIDE = Config(vocabulary=512, width=128, layers=4, heads=4, kv_heads=2, head_size=32, hidden=344, context=512)
LLAMA = dict(vocabulary=32000, head_size=128, context=4096, tied=False)
LLAMA_7B = Config(width=4096, layers=32, heads=32, kv_heads=32, hidden=11008, **LLAMA)
LLAMA_65B = Config(width=8192, layers=80, heads=64, kv_heads=64, hidden=22016, **LLAMA)
LLAMA3_8B = Config(128256, 4096, 32, 32, 8, 128, 14336, context=8192, tied=False)
CLOSE = 0.05  # of what is measured; kernels' work space and small tensors are not counted


def build(job):
    torch.manual_seed(0)
    return measured.build(job)


def tokens(job):
    return torch.randint(job.model.vocabulary, (job.batch, job.tokens), generator=torch.Generator().manual_seed(1))


def loss_of(model, job):
    return measured.loss_of(model, job, tokens(job))


def measured_activations(job):
    model, ids = build(job), tokens(job)
    with measured.mode(job, model):
        return saved_bytes(lambda: model.hidden(ids), model)


def measured_peak(job):
    """Of a step whose gradients are there already, above weights, gradients and states."""
    model = build(job)
    with measured.mode(job, model):
        loss_of(model, job).backward()
        return peak_memory(lambda: loss_of(model, job).backward())


# The meters


def test_a_view_counts_with_its_block_and_once():
    weight = torch.nn.Linear(1, 1)
    x = torch.ones(100, requires_grad=True)

    def function():
        block = x * 1
        return (block[:10].sin() + block[10:20].cos()).exp().sum()  # keeps two views of one block, and exp's result

    assert saved_tensors(function, weight) == [((10,), torch.float32, 400), ((10,), torch.float32, 40)]


def test_weights_do_not_count_as_activations():
    layer, x = torch.nn.Linear(30, 20), torch.ones(5, 30, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == 4 * 5 * 30


# States from counts


def test_bytes_of_states_by_hand():
    # 10 trained numbers and 6 frozen ones of 2 bytes; 64 in 4 bits are 32 bytes, a scale of 1, 4/256 of a scale of it
    assert state_bytes(10).tolist() == [20, 20, 40, 80]
    assert state_bytes(10, 6).tolist() == [32, 20, 40, 80]
    assert state_bytes(10, 6, 64).tolist() == [32 + 34, 20, 40, 80]  # 33.02 bytes, rounded up
    assert state_bytes(10, precision="bf16").tolist() == [20, 20, 0, 40]
    assert state_bytes(10, precision="fp32").tolist() == [40, 40, 0, 80]
    assert state_bytes(256, optimizer="adam8bit").tolist() == [512, 512, 1024, 512 + 8]  # two scales of 4 bytes
    assert state_bytes(10, 5, zero=3, ranks=4).tolist() == [8, 5, 10, 20]  # 7.5 rounded up


def test_states_are_these_bytes_by_name():
    for options in ({}, {"zero": 2, "ranks": 8}, {"precision": "bf16", "optimizer": "adam8bit"}):
        found = states(1e6, frozen=5e6, packed=3e6, **options)
        parts = [found.weights, found.gradients, found.master, found.optimizer]
        assert parts == state_bytes(1e6, 5e6, 3e6, **options).tolist()


# ZeRO and offload


def test_each_stage_of_zero_shards_one_part_more():
    whole = states(1000.0)
    assert (whole.weights, whole.gradients, whole.master, whole.optimizer) == (2000, 2000, 4000, 8000)
    parts = ["optimizer", "master", "gradients", "weights"]
    for stage, sharded in enumerate([[], parts[:2], parts[:3], parts]):
        found = states(1000.0, zero=stage, ranks=4)
        for part in parts:
            assert getattr(found, part) == getattr(whole, part) / (4 if part in sharded else 1)


def test_uneven_shards_are_rounded_up():
    assert states(10.0, zero=3, ranks=3).weights == 7  # 20 bytes


def test_whole_parts_for_a_moment():
    block = sum(prod(shape) for name, shape in shapes(LLAMA_7B).items() if name.startswith("blocks.0."))
    job = Job(LLAMA_7B, ranks=8)
    sizes = [gathered(replace(job, zero=stage)) for stage in range(4)]
    assert sizes == [0, 0, 2 * block, 4 * block]  # 2: one block's gradients before they are shared out
    assert gathered(replace(job, zero=3, ranks=1)) == 0
    assert gathered(replace(job, zero=3, method="lora")) == 2 * block
    assert gathered(replace(job, offload="all")) == 4 * block


def test_offload_moves_bytes_and_makes_none():
    whole = states(1e6)
    for offload, stay in [("optimizer", whole.weights), ("all", 0)]:
        found = states(1e6, offload=offload)
        assert (found.states, found.host) == (stay, whole.states - stay)


# Published figures


def test_zero_figure_1():
    # arXiv:1910.02054: 7.5 billion parameters, 64 ranks, GB
    found = [states(7.5e9, zero=stage, ranks=64).total / 1e9 for stage in range(4)]
    assert found == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)
    assert states(1.5e9).total == 24e9  # section 3: GPT-2 of 1.5 billion needs at least 24 GB


@pytest.mark.parametrize(
    ("parameters", "full", "bf16", "lora", "qlora"),
    [(6.74e9, 108, 54, 14.0, 4.0), (13.0e9, 208, 104, 27.0, 7.7), (69e9, 1104, 552, 143.5, 41.1)],
)
def test_states_of_7b_13b_and_70b(parameters, full, bf16, lora, qlora):
    # GB; adapters of 0.5 % of the weights
    adapters = 0.005 * parameters
    assert states(parameters).total / 1e9 == pytest.approx(full, abs=0.5)
    assert states(parameters, precision="bf16").total / 1e9 == pytest.approx(bf16, abs=0.5)
    assert states(adapters, frozen=parameters).total / 1e9 == pytest.approx(lora, abs=0.05)
    assert states(adapters, packed=parameters).total / 1e9 == pytest.approx(qlora, abs=0.05)


def test_qlora_65b_on_a_card_of_48_gb():
    # arXiv:2305.14314, abstract: under 48 GB instead of over 780 GB, adapters of rank 64 on all matrices
    assert sum(map(prod, shapes(LLAMA_65B).values())) == 65_285_660_672
    job = Job(LLAMA_65B, 1, 512, method="qlora", rank=64, checkpoint=True)
    assert 40e9 < estimate(job).total < 48e9
    whole = estimate(replace(job, method="full"))
    assert whole.states - whole.master == pytest.approx(780e9, rel=0.01)  # 12 bytes a weight, no float32 copies
    assert whole.total > 1000e9


def test_eight_bit_adam_is_10_bytes_a_weight():
    # arXiv:2110.02861: 2 bytes for the means instead of 8
    assert states(1e9, optimizer="adam8bit").total / 1e9 == pytest.approx(10, abs=0.05)


def test_zero_offload_13b_on_a_card_of_32_gb():
    # arXiv:2101.06840: 13 billion parameters on one V100; 16-bit weights stay
    found = states(13e9, offload="optimizer")
    assert found.total == 26e9
    assert found.host == 14 * 13e9


def test_activations_of_gpt():
    # arXiv:2205.05198: the square part is 80 of GPT-3's and 64 of MT-NLG's bytes; recomputing it saves 70 % and 65 %
    for s, h, a, square, saved in [(2048, 12288, 96, 80, 0.70), (2048, 20480, 128, 64, 0.65)]:
        unit = s * h
        assert gpt_layer(s, 1, h, a) / unit == pytest.approx(34 + square)
        assert 1 - gpt_layer(s, 1, h, a, selective=True) / gpt_layer(s, 1, h, a) == pytest.approx(saved, abs=0.005)
        assert gpt_layer(s, 1, h, a, tensor=8) / unit == pytest.approx(10 + 24 / 8 + square / 8)
        assert gpt_layer(s, 1, h, a, tensor=8, sequence=True) / unit == pytest.approx((34 + square) / 8)
        assert gpt_layer(s, 1, h, a, tensor=8, sequence=True, selective=True) / unit == pytest.approx(34 / 8)


def test_activations_of_7b_at_4096():
    # 32 GPT layers of width 4096: 104 GB, 18.3 GB with FlashAttention, 1.07 GB where only inputs of layers are kept
    layer = gpt_layer(4096, 1, 4096, 32)
    flash = gpt_layer(4096, 1, 4096, 32, selective=True)
    assert 32 * layer / 1e9 == pytest.approx(104, abs=0.5)
    assert 32 * flash / 1e9 == pytest.approx(18.3, abs=0.06)
    assert activations(Job(LLAMA_7B, 1, 4096, checkpoint=True)) / 1e9 == pytest.approx(1.07, abs=0.01)


def test_logits_of_llama_3_at_4096():
    # one float32 tensor of logits is 2.1 GB, and its gradient as much; the loss has a third one for a moment
    assert logits_peak(Job(LLAMA3_8B, 1, 4096)) / 1e9 == pytest.approx(3 * 2.1, rel=0.02)
    assert logits_peak(Job(LLAMA3_8B, 1, 4096, chunk=512)) < 0.6 * logits_peak(Job(LLAMA3_8B, 1, 4096))


# What people forget


def test_states_alone_say_that_it_fits():
    job = Job(LLAMA3_8B, 4, 4096, method="lora")
    memory, card = estimate(job), 80 * 2**30
    assert memory.states < card / 4  # "LoRA of 8B needs 17 GB"
    assert memory.states + memory.activations > card
    parts = budget(replace(job, batch=1))
    assert parts["activations"] + parts["logits"] > 1.5 * memory.states


def test_gb_and_gib_are_7_percent_apart():
    card = 24
    job = Job(LLAMA_7B, 1, 2048, method="qlora", checkpoint=True, chunk=512)
    assert fits(card * 2**30, job) > fits(card * 10**9, job) > 0


# What the notebook asks


@pytest.mark.parametrize("chunk", [0, 512])
@pytest.mark.parametrize("options", [{}, {"method": "qlora", "zero": 3, "ranks": 4}, {"offload": "optimizer"}])
def test_budget_is_the_total_part_by_part(options, chunk):
    job = Job(LLAMA3_8B, 2, 2048, chunk=chunk, checkpoint=True, **options)
    parts, memory = budget(job), estimate(job)
    assert sum(parts.values()) == memory.total
    assert ("logits" in parts) != ("layer" in parts)
    order = list(Memory.__dataclass_fields__)
    assert list(parts) == sorted(parts, key=order.index)
    assert all(parts.values())


@pytest.mark.parametrize("vary", ["batch", "tokens"])
def test_fits_is_the_largest_that_does(vary):
    job, card = Job(LLAMA_7B, 1, 512, method="lora", checkpoint=True), 24 * 2**30
    best = fits(card, job, vary=vary, reserve=2**30)
    assert estimate(replace(job, **{vary: best})).total <= card - 2**30
    if vary == "batch" or best < LLAMA_7B.context:
        assert estimate(replace(job, **{vary: best + 1})).total > card - 2**30


def test_fits_stops_at_the_context_and_at_nothing():
    assert fits(10**15, Job(SMALL, tokens=8), vary="tokens") == 64
    assert fits(10**9, Job(LLAMA_7B)) == 0


def test_checkpointed_model_computes_the_same_and_is_itself_afterwards():
    job = Job(SMALL, 2, 12, precision="fp32")
    model = build(job)
    loss_of(model, job).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with checkpointed(model):
        loss_of(model, job).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    assert saved_bytes(lambda: model.hidden(tokens(job)), model) > 2 * activations(replace(job, checkpoint=True))


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adapter"}, "method must be one of full, lora, qlora, got adapter"),
        ({"precision": "fp8"}, "precision must be one of mixed, bf16, fp32, got fp8"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adam8bit, got sgd"),
        ({"zero": 4}, "zero must be one of 0, 1, 2, 3, got 4"),
        ({"offload": "disk"}, "offload must be one of none, optimizer, all, got disk"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"tokens": 65}, "at most the model's context, 64, got 65"),
        ({"model": replace(SMALL, experts=4)}, "only dense layers without qk_norm are counted"),
        ({"model": replace(SMALL, qk_norm=True)}, "only dense layers without qk_norm are counted"),
        ({"adapted": ("q_proj",)}, "adapted must be some of qkv, out, gate_up, down, got q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        replace(Job(SMALL, tokens=8), **options)


def test_refuses_to_vary_anything_else():
    with pytest.raises(ValueError, match="vary must be batch or tokens, got rank"):
        fits(10**9, Job(SMALL, tokens=8), vary="rank")


# States


def stepped(job):
    """Model and optimizer after a step, its gradients still there."""
    model = build(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained) if job.optimizer == "adam8bit" else torch.optim.AdamW(trained)
    loss_of(model, job).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_states_after_a_step(method, optimizer, precision):
    job = Job(WIDE, 1, 8, method=method, precision=precision, optimizer=optimizer, rank=8)
    found, expected = measured_states(*stepped(job)), estimate(job)
    for part in ("weights", "gradients", "optimizer"):
        # bitsandbytes' and our blocks end with each tensor, and PyTorch's step count is a tensor: small, here 1 %
        assert getattr(expected, part) == pytest.approx(getattr(found, part), rel=CLOSE)
    if optimizer == "adamw" and method != "qlora":
        assert (found.weights, found.gradients) == (expected.weights, expected.gradients)


def test_mixed_precision_is_16_bytes_a_weight():
    # 16-bit weights and gradients, and an optimizer on float32 copies
    job = Job(WIDE, 1, 8)
    model = build(job)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    loss_of(model, job).backward()
    for master, weight in zip(masters, model.parameters(), strict=True):
        master.grad = weight.grad.float()
    optimizer.step()
    for master, weight in zip(masters, model.parameters(), strict=True):
        master.grad = None
        weight.data.copy_(master)
    found = measured_states(model, optimizer)
    found = replace(found, master=sum(master.nbytes for master in masters))
    count = sum(p.numel() for p in model.parameters())
    assert found.states == pytest.approx(16 * count, rel=1e-3)  # the step counts
    assert found.states == pytest.approx(estimate(job).states, rel=1e-3)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_counts_of_weights_are_the_models(method):
    job = Job(replace(WIDE, tied=False), 1, 8, method=method, rank=4, adapted=("qkv", "down"))
    model = build(replace(job, method="full" if method == "full" else "lora"))
    names = {n.replace("parametrizations.", "").replace(".original", ""): p.shape for n, p in model.named_parameters()}
    assert shapes(job.model) == {name: shape for name, shape in names.items() if not name.endswith((".a", ".b"))}
    counts = weight_counts(job)
    assert counts["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    packed = sum(prod(s) for name, s in shapes(job.model).items() if name.endswith(MATRICES))
    assert counts["packed"] == (packed if method == "qlora" else 0)


# Activations: every tensor, exactly


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["flash", "naive"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_activations_are_the_saved_tensors(method, kv_heads, attention, precision):
    config = replace(SMALL, kv_heads=kv_heads)
    job = Job(config, 3, 12, method=method, precision=precision, rank=4, attention=attention, device="cpu")
    assert measured_activations(job) == activations(job) + last_norm(job)


@pytest.mark.parametrize(
    ("change", "batch", "length"),
    [
        ({"width": 32}, 1, 30),
        ({"width": 200}, 2, 7),
        ({"heads": 8, "kv_heads": 8}, 2, 33),
        ({"heads": 8, "kv_heads": 2, "head_size": 16}, 5, 20),
        ({"hidden": 300}, 4, 17),
        ({"layers": 7}, 2, 64),
        ({"tied": False}, 2, 9),
    ],
)
@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_activations_at_other_sizes(change, batch, length, attention):
    job = Job(replace(SMALL, **change), batch, length, precision="fp32", attention=attention, device="cpu")
    assert measured_activations(job) == activations(job) + last_norm(job)


@pytest.mark.parametrize("adapted", [names for k in (1, 2, 3) for names in itertools.combinations(MATRICES, k)])
def test_activations_of_any_choice_of_adapters(adapted):
    job = Job(SMALL, 3, 12, method="lora", precision="fp32", rank=4, adapted=adapted, device="cpu")
    assert measured_activations(job) == activations(job) + last_norm(job)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_keeps_one_stream_a_block(method, precision):
    job = Job(SMALL, 3, 12, method=method, precision=precision, checkpoint=True, rank=4, device="cpu")
    ids = 8 * 3 * 12 if method == "full" else 0
    assert activations(job) == 3 * (3 * 12 * 64 * (4 if precision == "fp32" else 2)) + ids
    assert measured_activations(job) == activations(job) + last_norm(job)


class FusedNorm(torch.autograd.Function):
    """What the GPU's kernel keeps: its input and one factor a token."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        factor = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, factor)
        return (x.float() * factor * weight.float()).to(x.dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_activations_with_the_norm_of_a_gpu(method, precision, monkeypatch):
    monkeypatch.setattr(transformer, "rms_norm", lambda x, weight, eps: FusedNorm.apply(x, weight, eps))
    job = Job(SMALL, 3, 12, method=method, precision=precision, rank=4)
    assert measured_activations(job) == activations(job) + last_norm(job)


def test_textbook_attention_keeps_at_least_the_square():
    # attention as the formula says it keeps two square matrices, softmax's result and nan_to_num's, of which the
    # estimate has one; and a mask
    from minillm.attention.naive import attention

    job = Job(SMALL, 2, 60, precision="fp32", attention="naive", device="cpu")
    model, ids = build(job), tokens(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "attend", lambda q, k, v, visible: attention(q, k, v, causal=True))
        found = saved_bytes(lambda: model.hidden(ids), model)
    square = 4 * 2 * 4 * 60 * 60
    mask = 60 * 60  # one byte a pair
    assert found == activations(job) + last_norm(job) + 3 * (square + mask)


def test_twice_the_length_is_twice_the_bytes_with_flash_and_more_without():
    def size(length, attention):
        return activations(Job(LLAMA_7B, 1, length, attention=attention))

    assert size(4096, "flash") == 2 * size(2048, "flash")
    assert size(4096, "naive") > 3 * size(2048, "naive")


def test_lora_does_not_remove_activations():
    def size(method, adapted=MATRICES):
        return sum(block_tensors(Job(LLAMA3_8B, method=method, adapted=adapted)).values())

    full, lora, qkv, frozen = size("full"), size("lora"), size("lora", ("qkv",)), size("lora", ())
    assert full < lora < 1.01 * full  # the thin products' own input comes on top
    assert 0.7 * full < frozen < qkv < full


# Peaks of real steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("vocabulary", "chunk"), [(64, 0), (4096, 0), (4096, 64)])
def test_peak_of_a_step(vocabulary, chunk, checkpoint, method, precision):
    job = Job(
        replace(WIDE, vocabulary=vocabulary),
        2,
        256,
        method=method,
        precision=precision,
        rank=4,
        checkpoint=checkpoint,
        chunk=chunk,
        device="cpu",
    )
    memory = estimate(job)
    assert memory.total - memory.states == pytest.approx(measured_peak(job), rel=CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "naive"},
        {"attention": "naive", "checkpoint": True},
        {"attention": "naive", "precision": "bf16", "checkpoint": True},
        {"method": "lora", "adapted": ("qkv",)},
        {"method": "lora", "adapted": ("qkv",), "checkpoint": True},
        {"method": "lora", "adapted": ("gate_up",), "precision": "bf16", "checkpoint": True},
        {"model": replace(WIDE, tied=False, kv_heads=4)},
        {"batch": 1, "tokens": 512},
        {"batch": 6, "tokens": 64},
    ],
)
def test_peak_of_other_steps(options):
    job = replace(Job(WIDE, 2, 256, precision="fp32", rank=4, device="cpu"), **options)
    memory = estimate(job)
    assert memory.total - memory.states == pytest.approx(measured_peak(job), rel=CLOSE)
