"""The exercise of finetuning/memory: bytes of weights, gradients and optimizer states, and its wrong versions."""

from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from minillm.study.exercise import Case, Exercise, Probe, Wrong

STUB = '''\
# exercise: finetuning/memory
import math

import torch


def state_bytes(trained, frozen=0, packed=0, *, precision="mixed", optimizer="adamw", zero=0, ranks=1):
    """Bytes on one device between two steps: weights, gradients, float32 masters, Adam's means. int64 [4].

    trained, frozen and packed are numbers of weights. Frozen ones are stored like trained ones; packed
    ones are frozen in NF4: 4 bits, for each 64 a scale of 8 bits, for each 256 scales one of 32 bits.
    "mixed": 16-bit weights and gradients, float32 masters and means. "bf16": 16 bits for all, no masters.
    "fp32": 32 bits for all, no masters. Adam has two means; with "adam8bit" each takes 8 bits, and each
    256 numbers of a mean one float32 scale. ZeRO shares evenly among the ranks: stage 1 means and
    masters, 2 gradients as well, 3 all weights as well. Round each of the four up to a whole byte.
    """
    raise NotImplementedError
'''


def oracle(trained, frozen=0, packed=0, *, precision="mixed", optimizer="adamw", zero=0, ranks=1):  # type: ignore[no-untyped-def]
    """Bits, added up one kind after the other, in fractions."""
    wide = {"mixed": (16, 32, 32), "bf16": (16, 0, 16), "fp32": (32, 0, 32)}[precision]
    bits, master, mean = wide
    nf4 = 4 + Fraction(8, 64) + Fraction(32, 64 * 256)
    parts = [
        bits * trained + bits * frozen + nf4 * packed,
        bits * trained,
        master * trained,
        trained * (2 * mean if optimizer == "adamw" else 2 * (8 + Fraction(32, 256))),
    ]
    for part, stage in enumerate((3, 2, 1, 1)):
        if zero >= stage:
            parts[part] = Fraction(parts[part]) / ranks
    return torch.tensor([ceil(Fraction(part) / 8) for part in parts])


EIGHT_B, MATRICES, ADAPTERS = 8_030_261_248, 6_979_321_856, 41_943_040  # Llama 3 8B, rank 16


def make_cases() -> list[Case]:
    return [
        Case("ten weights", (10,), {}, "mixed precision: 20, 20, 40 and 80 bytes"),
        Case("Llama 3 8B", (EIGHT_B,), {}, "full fine-tuning, 16 bytes a weight"),
        Case("LoRA", (ADAPTERS, EIGHT_B), {}, "8 billion weights frozen, 42 million trained"),
        Case("QLoRA", (ADAPTERS, EIGHT_B - MATRICES, MATRICES), {}, "the matrices frozen in 4 bits"),
        Case("bf16", (1_000_001, 500), {"precision": "bf16"}, "16 bits for all: no masters"),
        Case("float32", (1_000_001,), {"precision": "fp32"}, "32 bits for all: no masters"),
        Case("8-bit Adam", (1_024_000,), {"optimizer": "adam8bit"}, "means in 8 bits with scales"),
        Case("ZeRO-1", (7_500_000,), {"zero": 1, "ranks": 64}, "means and masters shared by 64"),
        Case("ZeRO-2", (7_500_000,), {"zero": 2, "ranks": 64}, "gradients as well"),
        Case("ZeRO-3", (10_007, 5_001, 16_384), {"zero": 3, "ranks": 3}, "all shared, and no part divides by 3"),
        Case("ranks alone", (1_000,), {"ranks": 8}, "eight copies: nothing is shared"),
    ]


def counts_alone(function: Callable[..., Any]) -> str | None:
    """The answer is for any size, not for the cases."""
    one, two = function(1_024_000), function(2_048_000)
    return None if torch.equal(2 * one, two) else "Twice as many weights do not take twice as many bytes."


def whole_numbers(function: Callable[..., Any]) -> str | None:
    """float32 has 24 bits; 405 billion weights need more."""
    got, right = function(405_853_388_801), torch.tensor([2, 2, 4, 8]) * 405_853_388_801
    if isinstance(got, Tensor) and not torch.equal(got, right):
        return "The bytes of 405,853,388,801 weights are rounded: add up whole numbers, not float32."
    return None


WEIGHTS = "share(3, weight * (trained + frozen) + nf4.bits_per_weight() / 8 * packed),"
GRADIENTS = "share(2, gradient * trained),"
MASTER = "share(1, master * trained),"
MEANS = "share(1, means * trained),"
ADAM = 'means = 2 * mean if optimizer == "adamw" else 2 * (1 + 4 / adam8bit.BLOCK)'
SHARE = "return ceil(size / ranks if zero >= stage else size)"
MIXED = 'PRECISIONS = {"mixed": (2, 2, 4, 4), "bf16": (2, 2, 0, 2), "fp32": (4, 4, 0, 4)}'
LORA, NF4, ADAM8BIT = "finetuning/lora", "finetuning/nf4", "finetuning/adam8bit"
MEASURED = "finetuning/measured"

EXERCISE = Exercise(
    question="finetuning/memory",
    module="finetuning/memory",
    function="state_bytes",
    stub=STUB,
    make_cases=make_cases,
    expected=oracle,
    outputs=("bytes by part",),
    rtol=0.0,  # whole numbers
    atol=0.0,
    wrong=(
        Wrong(
            "no master copy",
            MIXED,
            MIXED.replace('"mixed": (2, 2, 4, 4)', '"mixed": (2, 2, 0, 4)'),
            "You count 12 bytes a weight: mixed precision also keeps a float32 master of every trained weight, so 16.",
        ),
        Wrong(
            "gradients in float32",
            MIXED,
            MIXED.replace('"mixed": (2, 2, 4, 4)', '"mixed": (2, 4, 4, 4)'),
            "You keep gradients in float32: in this recipe they have 16 bits, as the weights have.",
        ),
        Wrong(
            "gradients always in float32",
            GRADIENTS,
            "share(2, 4 * trained),",
            "You keep all gradients in float32: they have as many bits as the weights, 16 in two of the precisions.",
        ),
        Wrong(
            "masters everywhere",
            MIXED,
            MIXED.replace('"bf16": (2, 2, 0, 2)', '"bf16": (2, 2, 4, 2)').replace("(4, 4, 0, 4)", "(4, 4, 4, 4)"),
            "You give every precision a master copy: only mixed precision has one.",
        ),
        Wrong("one mean", MEANS, "share(1, means / 2 * trained),", "Adam keeps two means a weight, you count one."),
        Wrong(
            "8-bit means without scales",
            ADAM,
            ADAM.replace("(1 + 4 / adam8bit.BLOCK)", "1"),
            "The 8-bit means have scales: 4 bytes for each 256 numbers of each mean.",
        ),
        Wrong(
            "frozen weights have gradients",
            GRADIENTS,
            "share(2, gradient * (trained + frozen)),",
            "You give frozen weights gradients: only trained ones have any, which is what LoRA saves.",
        ),
        Wrong(
            "frozen weights have means",
            MEANS,
            "share(1, means * (trained + frozen)),",
            "You give frozen weights means: Adam's exist for trained weights only.",
        ),
        Wrong(
            "all weights have means",
            MEANS,
            "share(1, means * (trained + frozen + packed)),",
            "You give frozen and packed weights means: Adam's exist for trained weights only.",
        ),
        Wrong(
            "frozen weights have masters",
            MASTER,
            "share(1, master * (trained + frozen)),",
            "You give frozen weights masters: only what is updated needs a float32 copy.",
        ),
        Wrong(
            "adapters without base weights",
            WEIGHTS,
            WEIGHTS.replace("(trained + frozen)", "trained"),
            "The frozen weights are missing: they are not trained, but every forward pass needs them.",
        ),
        Wrong(
            "half a byte",
            WEIGHTS,
            WEIGHTS.replace("nf4.bits_per_weight() / 8", "0.5"),
            "Four bits and nothing else: the scales of the blocks make it 4.127 bits, 0.516 bytes.",
        ),
        Wrong(
            "float32 scales",
            WEIGHTS,
            WEIGHTS.replace("bits_per_weight()", "bits_per_weight(second=None)"),
            "Your scales have 32 bits, 4.5 bits a weight: double quantisation keeps them in 8.",
        ),
        Wrong(
            "stage 1 shards gradients",
            GRADIENTS,
            GRADIENTS.replace("share(2", "share(1"),
            "You share gradients from stage 1 on: stage 1 shares masters and means, stage 2 gradients as well.",
        ),
        Wrong(
            "masters are not shared",
            MASTER,
            MASTER.replace("share(1", "share(3"),
            "The masters belong to the optimizer: they are shared from stage 1 on.",
        ),
        Wrong(
            "masters are never shared",
            MASTER,
            MASTER.replace("share(1", "share(4"),
            "You share the masters at no stage: they belong to the optimizer and are shared from stage 1 on.",
        ),
        Wrong(
            "ranks share without ZeRO",
            SHARE,
            "return ceil(size / ranks)",
            "You divide by the ranks at every stage: plain data parallelism keeps a full copy on each.",
        ),
        Wrong(
            "one rank too few",
            SHARE,
            "return ceil(size / max(1, ranks - 1) if zero >= stage else size)",
            "Each of N ranks holds 1 / N, not 1 / (N - 1).",
        ),
        Wrong(
            "rounded down",
            SHARE,
            "return int(size / ranks if zero >= stage else size)",
            "Round up: a shard that is a byte too short loses a byte.",
        ),
    ),
    also_wrong=(
        Wrong(
            "offload makes bytes vanish",
            "away = sum(size for name, size in parts.items() if name not in kept)",
            "away = 0",
            "What leaves the device is in main memory.",
        ),
        Wrong(
            "masters moved, gradients not",
            '"optimizer": ("weights",), "all": ()}',
            '"optimizer": ("weights", "gradients"), "all": ()}',
            "ZeRO-Offload moves gradients as they are made.",
        ),
        Wrong(
            "whole parts forgotten",
            "return max(counts.values()) * whole",
            "return 0",
            "A block is whole while it computes, even where its weights are sharded.",
        ),
        Wrong(
            "activations of one layer",
            "return ids + first + (config.layers - 1) * other",
            "return ids + first",
            "Every layer keeps its tensors until the backward pass has reached it.",
        ),
        Wrong(
            "one tensor of logits",
            "loss = rows * v * 12 +",
            "loss = rows * v * e +",
            "Logits, log-probabilities and a gradient are there together, in float32.",
        ),
        Wrong(
            "checkpointing keeps nothing",
            "return ids + config.layers * n * config.width * PRECISIONS[job.precision][0]",
            "return ids",
            "The input of every block is kept.",
        ),
        Wrong(
            "weights count as activations",
            "seen = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}",
            "seen: set[int] = set()",
            "Weights are there anyway.",
        ),
        Wrong(
            "views count in full",
            "            seen.add(storage.data_ptr())\n",
            "",
            "Two views of one memory block are one block.",
        ),
        Wrong(
            "equation 2 without the ten",
            "return s * b * h * (10 + (24 + square) / tensor)",
            "return s * b * h * (34 + square) / tensor",
            "Without sequence parallelism 10 of the 34 bytes are not shared.",
        ),
        Wrong(
            "reserve added",
            "<= card_bytes - reserve",
            "<= card_bytes + reserve",
            "What is reserved is not for the job.",
        ),
        Wrong(
            "scale is alpha",
            "self.scale, self.merged = alpha / rank, False",
            "self.scale, self.merged = alpha, False",
            "The product is scaled by alpha / r.",
            LORA,
        ),
        Wrong(
            "parameters of the square",
            "return rank * sum(shape)",
            "return rank * shape[0] * 2",
            "r (i + o): matrices are not square.",
            LORA,
        ),
        Wrong(
            "levels evenly spaced",
            "return (torch.cat([below.flip(0), torch.zeros(1), above]) / above[-1]).float()",
            "return torch.linspace(-1, 1, 16)",
            "The levels are quantiles of the normal distribution.",
            NF4,
        ),
        Wrong(
            "one scale for the tensor",
            "largest = padded.abs().amax(dim=1)",
            "largest = padded.abs().amax().expand(len(padded)).clone()",
            "Each block of 64 has its own scale, so that an outlier hurts 63 others only.",
            NF4,
        ),
        Wrong(
            "bits without scales",
            "return 4 + 32 / block if second is None else 4 + 8 / block + 32 / (block * second)",
            "return 4.0",
            "The scales count: 4.5 bits with float32 ones, 4.127 with double quantisation.",
            NF4,
        ),
        Wrong(
            "means kept in float32",
            "state[name] = quantise_blocks(means[name].flatten(), levels, BLOCK)",
            "state[name] = (means[name].flatten(), torch.ones(1))",
            "Between steps the means are codes of one byte.",
            ADAM8BIT,
        ),
        Wrong(
            "peak without the states",
            "return replace(found, activations=kept), found.states + peak",
            "return replace(found, activations=kept), peak",
            "The profiler counts from the start of the step: what was there before comes on top.",
            MEASURED,
        ),
        Wrong(
            "QLoRA without adapters",
            'if job.method != "full":',
            'if job.method == "lora":',
            "Weights in 4 bits have no gradient: without adapters nothing learns.",
            MEASURED,
        ),
        Wrong(
            "checkpointing forgotten",
            "with kernel, checkpointed(model) if job.checkpoint else nullcontext():",
            "with kernel:",
            "The blocks must be run inside `checkpointed` for anything to be dropped.",
            MEASURED,
        ),
    ),
    probes=(Probe("counts alone", counts_alone, wrong_too=True), Probe("whole numbers", whole_numbers)),
    hints=(
        "Bytes a number in mixed precision: weight 2, gradient 2, master 4, means 2 x 4. Only weights exist for "
        "frozen ones.",
        "Four products, one a part. A packed weight takes (4 + 8/64 + 32/(64 x 256)) / 8 bytes.",
        "Divide a part by the ranks only if `zero` has reached its stage: means and masters 1, gradients 2, weights 3.",
        "An 8-bit mean takes 1 + 4/256 bytes a number. Then math.ceil each part, and torch.tensor of four ints.",
    ),
)
