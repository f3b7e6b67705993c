"""Llama 1, 2 and 3 as data: what was published, what it counts to, and blocks with one part of the recipe replaced.

Idea:        All three are one decoder: RMSNorm before each layer, SwiGLU, rotary positions, no biases. From release to
             release numbers change, hardly the code: the context, the key/value heads, the vocabulary, the rotary base.
             3.1 slows the slow rotations for a longer context. A configuration therefore says how many parameters
             there are and how many bytes a token leaves in the cache, without a model.
Cost:        Parameters: 2 v c for embedding and head; a layer has 2 c d (h + g) in attention, 3 c f in the feed-forward
             layer, 2 c in norms. Cache: 2 layers g d values a token.
Paper:       Touvron et al. 2023, arXiv:2302.13971, table 2; Touvron et al. 2023, "Llama 2", arXiv:2307.09288, table 1;
             Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, table 3.
Production:  transformers LlamaForCausalLM (counts) and its rope_type "llama3" (frequencies).
Leaves out:  Llama 2 34B, the models after 3.1, and everything that is not architecture: data and training after it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.architecture.feedforward import matched_hidden, relu_feedforward, swiglu_fused
from minillm.architecture.moe import Routing
from minillm.architecture.norm import layer_norm, rms_norm
from minillm.architecture.transformer import Block, Cache, Config, Transformer
from minillm.attention.gqa import cache_bytes


@dataclass(frozen=True)
class Release:
    """A published model: its shape, and how much text it was trained on."""

    config: Config
    tokens: float  # of pretraining, in trillions; Llama 3's card says "15T+"


def llama(
    width: int, layers: int, heads: int, *, kv_heads: int | None = None, wider: float = 1.0, multiple: int = 256,
    vocabulary: int = 32000, base: float = 1e4, context: int, eps: float = 1e-5,
) -> Config:  # fmt: skip
    """A configuration as Meta writes it: heads of width / heads, a feed-forward width by rule, an untied head.

    >>> llama(4096, 32, 32, context=2048).hidden, llama(4096, 32, 32, wider=1.3, multiple=1024, context=8192).hidden
    (11008, 14336)
    """
    hidden = multiple * math.ceil(int(wider * matched_hidden(width)) / multiple)
    return Config(
        vocabulary=vocabulary, width=width, layers=layers, heads=heads, kv_heads=kv_heads or heads,
        head_size=width // heads, hidden=hidden, context=context, base=base, eps=eps, tied=False,
    )  # fmt: skip


ONE: dict[str, Any] = dict(context=2048, eps=1e-6)
TWO: dict[str, Any] = dict(context=4096)
THREE: dict[str, Any] = dict(context=8192, vocabulary=128256, base=5e5, kv_heads=8)
LONG = THREE | dict(context=2**17)  # its rotations are slowed by `scaled_frequencies`
RELEASES = {
    "Llama 1 7B": Release(llama(4096, 32, 32, **ONE), 1.0),
    "Llama 1 13B": Release(llama(5120, 40, 40, **ONE), 1.0),
    "Llama 1 33B": Release(llama(6656, 60, 52, **ONE), 1.4),
    "Llama 1 65B": Release(llama(8192, 80, 64, context=2048), 1.4),  # the one of the four with eps 1e-5
    "Llama 2 7B": Release(llama(4096, 32, 32, **TWO), 2.0),
    "Llama 2 13B": Release(llama(5120, 40, 40, **TWO), 2.0),
    "Llama 2 70B": Release(llama(8192, 80, 64, kv_heads=8, wider=1.3, multiple=4096, **TWO), 2.0),
    "Llama 3 8B": Release(llama(4096, 32, 32, wider=1.3, multiple=1024, **THREE), 15.0),
    "Llama 3 70B": Release(llama(8192, 80, 64, wider=1.3, multiple=4096, **THREE), 15.0),
    "Llama 3.1 405B": Release(llama(16384, 126, 128, wider=1.2, multiple=4096, **LONG), 15.0),
}


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that changed, each with its old and its new value.

    >>> differences(RELEASES["Llama 1 7B"].config, RELEASES["Llama 2 7B"].config)
    {'context': (2048, 4096), 'eps': (1e-06, 1e-05)}
    """
    return {name: (value, asdict(new)[name]) for name, value in asdict(old).items() if asdict(new)[name] != value}


def parameter_parts(config: Config) -> dict[str, int]:
    """Parameters by part, from the configuration alone. ValueError for a mixture of experts or norms on heads.

    >>> parts = parameter_parts(RELEASES["Llama 3 8B"].config)
    >>> f"{sum(parts.values()):,}", f"{parts['embedding'] + parts['head']:,}"
    ('8,030,261,248', '1,050,673,152')
    """
    if config.experts or config.qk_norm:
        raise ValueError(f"counted are Llama's blocks, got experts={config.experts}, qk_norm={config.qk_norm}")
    c, n, table = config.width, config.layers, config.vocabulary * config.width
    return {
        "embedding": table,
        "attention": n * 2 * c * config.head_size * (config.heads + config.kv_heads),
        "feed-forward": n * 3 * c * config.hidden,
        "norms": (2 * n + 1) * c,
        "head": 0 if config.tied else table,
    }


def cached_bytes(config: Config, *, bytes_per_value: int = 2) -> int:
    """Bytes that one token leaves in the key/value cache.

    >>> cached_bytes(RELEASES["Llama 2 7B"].config) // 1024, cached_bytes(RELEASES["Llama 3 8B"].config) // 1024
    (512, 128)
    """
    shape = dict(layers=config.layers, kv_heads=config.kv_heads, head_size=config.head_size)
    return cache_bytes(**shape, tokens=1, bytes_per_value=bytes_per_value)


def scaled_frequencies(
    frequencies: Float[Tensor, " half"], *, factor: float = 8, low: float = 1, high: float = 4, original: int = 8192
) -> Float[Tensor, " half"]:
    """Llama 3.1's: pairs that turn fewer than `low` times in the original context slow down by `factor`.

    Those that turn more than `high` times stay; between, the two are mixed linearly in the number of turns.

    >>> turns = torch.tensor([8.0, 2.5, 0.5])
    >>> 8192 * scaled_frequencies(turns * 2 * math.pi / 8192) / (2 * math.pi)       # 8; halfway; 0.5 / 8
    tensor([8.0000, 1.4062, 0.0625])
    """
    if not 0 <= low < high:
        raise ValueError(f"low must be under high, got {low} and {high}")
    turns = frequencies * original / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


class PlainBlock(Block):
    """Llama's block, written so that a subclass replaces its norm or its feed-forward layer."""

    def normalise(self, x: Float[Tensor, "b t c"], weight: Float[Tensor, " c"]) -> Float[Tensor, "b t c"]:
        """What a layer reads of the stream."""
        return rms_norm(x, weight, eps=self.config.eps)

    def feedforward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """What the second layer adds to the stream."""
        return swiglu_fused(x, self.gate_up, self.down)

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        cos: Float[Tensor, "*p half"],
        sin: Float[Tensor, "*p half"],
        cache: Cache | None = None,
        visible: Tensor | None = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "b t c"]:
        """The stream after the block."""
        x = x + self.attention(self.normalise(x, self.attention_norm), cos, sin, cache, visible)
        return x + self.feedforward(self.normalise(x, self.feedforward_norm))


class LayerNormBlock(PlainBlock):
    """The mean is taken off as well."""

    def normalise(self, x: Float[Tensor, "b t c"], weight: Float[Tensor, " c"]) -> Float[Tensor, "b t c"]:
        """LayerNorm without a bias."""
        return layer_norm(x, weight, eps=self.config.eps)


class NoNormBlock(PlainBlock):
    """The layers read the stream as it is; only the norm before the head is left."""

    def normalise(self, x: Float[Tensor, "b t c"], weight: Float[Tensor, " c"]) -> Float[Tensor, "b t c"]:
        """Nothing but the weight."""
        return x * weight


class ReluBlock(PlainBlock):
    """Two matrices with a ReLU, half as wide again, so that the parameters are those of SwiGLU's three."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__(config, layer)
        if config.hidden % 2:
            raise ValueError(f"hidden must be even to become 3/2 of it, got {config.hidden}")
        self.gate_up = nn.Parameter(torch.empty(3 * config.hidden // 2, config.width))
        self.down = nn.Parameter(torch.empty(config.width, 3 * config.hidden // 2))

    def feedforward(self, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b t c"]:
        """max(0, x up) down."""
        return relu_feedforward(x, self.gate_up, self.down)


def with_blocks(config: Config, block: Callable[[Config, int], Block]) -> Transformer:
    """A model of other blocks. Their matrices are drawn with standard deviation 0.5 / sqrt(columns), layer outputs with
    that over sqrt(2 layers): larger than `Transformer`'s at small widths, where 0.02 takes long to grow."""
    model = Transformer(config)
    model.blocks = nn.ModuleList(block(config, layer) for layer in range(config.layers))
    for name, parameter in model.blocks.named_parameters():
        if parameter.ndim > 1:
            residual = name.endswith((".out", ".down"))
            std = 0.5 / parameter.shape[1] ** 0.5
            nn.init.normal_(parameter, std=std / (2 * config.layers) ** 0.5 if residual else std)
    return model
