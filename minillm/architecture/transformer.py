"""A decoder-only language model, Llama's blocks: everything between token ids and logits.

Idea:        A residual stream of one vector a token. Each block reads it normalised and adds back: first attention,
             which moves information between positions, then a feed-forward layer (or a mixture of experts), which works
             on each position alone. A causal mask lets all positions train at once; rotary positions enter the scores
             only. A final norm and a linear head give the logits of the next token.
Cost:        about 6 floating-point operations a parameter and token in training (2 forward, 4 backward) besides the
             scores, 2 in decoding. Decoding one sequence reads every weight once a token.
Paper:       Vaswani et al. 2017, arXiv:1706.03762; Touvron et al. 2023, "LLaMA", arXiv:2302.13971 (pre-norm RMSNorm,
             SwiGLU, rotary positions); Ainslie et al. 2023, arXiv:2305.13245 (grouped queries).
Production:  transformers LlamaForCausalLM, Qwen3ForCausalLM (`qk_norm`), MixtralForCausalLM (`experts`).
Leaves out:  dropout, biases, sliding windows. `pretrained` reads and writes their checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.architecture.feedforward import swiglu_fused
from minillm.architecture.moe import MoE, Routing
from minillm.architecture.norm import rms_norm
from minillm.attention.gqa import repeat_heads
from minillm.attention.naive import visible as causal_mask
from minillm.position.rope import apply_rope, inverse_frequencies, rotations


@dataclass(frozen=True)
class Config:
    """The shape of a model. ValueError for heads that do not divide."""

    vocabulary: int = 6400
    width: int = 512  # of the residual stream
    layers: int = 8
    heads: int = 8  # query heads
    kv_heads: int = 2  # key/value heads: `heads` for multi-head, 1 for multi-query attention
    head_size: int = 64
    hidden: int = 1408  # of the feed-forward layer, or of each expert
    context: int = 2048  # positions the rotation table covers
    base: float = 10000.0  # of the rotary frequencies
    eps: float = 1e-5  # of the norms
    tied: bool = True  # the head is the embedding
    qk_norm: bool = False  # RMSNorm on every query and key head, before the rotation
    experts: int = 0  # 0 for a dense feed-forward layer
    active: int = 2  # experts that a token uses
    renormalise: bool = True  # weights of the active experts sum to 1

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.experts and not 1 <= self.active <= self.experts:
            raise ValueError(f"active must be 1 to {self.experts}, the number of experts, got {self.active}")


class Cache:
    """Keys and values of every layer for the tokens seen so far, in memory that is allocated once.

    Set `length` back to forget the tokens after it: a new text with the same beginning need not be read again.
    """

    def __init__(self, config: Config, batch: int, tokens: int, *, like: Tensor) -> None:
        shape = (config.layers, batch, config.kv_heads, tokens, config.head_size)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0  # tokens in it

    def extend(
        self, layer: int, k: Float[Tensor, "b g t d"], v: Float[Tensor, "b g t d"]
    ) -> tuple[Float[Tensor, "b g s d"], Float[Tensor, "b g s d"]]:
        """Keys and values of the layer with the new ones at the end: views, nothing is copied but the new tokens."""
        end, (_, batch, _, tokens, _) = self.length + k.shape[2], self.k.shape
        if end > tokens or len(k) != batch:
            raise ValueError(f"the cache holds {tokens} tokens of {batch} sequences, got {end} of {len(k)}")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def attend(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b g s d"],
    v: Float[Tensor, "b g s d"],
    visible: Bool[Tensor, "b t s"] | None = None,
) -> Float[Tensor, "b h t d"]:
    """Attention to what is `visible`, or causal, the last query at the last key: the cheapest way of each case.

    One new token: the queries of a group share one row of the mask and become rows of one product with their keys.
    Longer sequences repeat the shared heads, which is faster than grouping them on a CPU.
    """
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    mask = None if visible is None else visible[:, None]  # b 1 t s
    if t == 1:
        return F.scaled_dot_product_attention(q.reshape(b, g, h // g, d), k, v, attn_mask=mask).view(b, h, 1, d)
    k, v = repeat_heads(k, h // g), repeat_heads(v, h // g)
    if mask is None and t < s:
        mask = causal_mask(t, s, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each on the normalised stream and added back to it."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        c, d, f = config.width, config.head_size, config.hidden
        self.attention_norm = nn.Parameter(torch.ones(c))
        self.qkv = nn.Parameter(torch.empty((config.heads + 2 * config.kv_heads) * d, c))  # q, then k, then v
        self.out = nn.Parameter(torch.empty(c, config.heads * d))
        self.q_norm = nn.Parameter(torch.ones(d)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(d)) if config.qk_norm else None
        self.feedforward_norm = nn.Parameter(torch.ones(c))
        if config.experts:
            self.moe = MoE(c, f, experts=config.experts, k=config.active, renormalise=config.renormalise)
        else:
            self.gate_up = nn.Parameter(torch.empty(2 * f, c))  # gate, then up
            self.down = nn.Parameter(torch.empty(c, f))

    def attention(
        self,
        x: Float[Tensor, "b t c"],
        cos: Float[Tensor, "*p half"],
        sin: Float[Tensor, "*p half"],
        cache: Cache | None,
        visible: Bool[Tensor, "b t s"] | None,
    ) -> Float[Tensor, "b t c"]:
        """The attention layer's addition to the stream."""
        config, (b, t, _) = self.config, x.shape
        h, g, d = config.heads, config.kv_heads, config.head_size
        heads = F.linear(x, self.qkv).view(b, t, h + 2 * g, d).transpose(1, 2)
        qk, v = heads.split((h + g, g), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((h, g), dim=1)
            qk = torch.cat([rms_norm(q, self.q_norm, eps=config.eps), rms_norm(k, self.k_norm, eps=config.eps)], dim=1)
        q, k = apply_rope(qk, cos, sin).split((h, g), dim=1)  # queries and keys in one pass
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return F.linear(attend(q, k, v, visible).transpose(1, 2).reshape(b, t, h * d), self.out)

    def forward(
        self,
        x: Float[Tensor, "b t c"],
        cos: Float[Tensor, "*p half"],
        sin: Float[Tensor, "*p half"],
        cache: Cache | None = None,
        visible: Bool[Tensor, "b t s"] | None = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "b t c"]:
        """The stream after the block."""
        eps = self.config.eps
        x = x + self.attention(rms_norm(x, self.attention_norm, eps=eps), cos, sin, cache, visible)
        normed = rms_norm(x, self.feedforward_norm, eps=eps)
        if not self.config.experts:
            return x + swiglu_fused(normed, self.gate_up, self.down)
        out, routing = self.moe(normed)
        if routings is not None:
            routings.append(routing)
        return x + out


def rotation_tables(config: Config) -> tuple[Float[Tensor, "p half"], Float[Tensor, "p half"]]:
    """Cosines and sines for every position of the context."""
    return rotations(torch.arange(config.context), inverse_frequencies(config.head_size, base=config.base))


class Transformer(nn.Module):
    """The model: embedding, blocks, final norm, head. Weights are drawn with standard deviation 0.02, outputs of the
    layers with 0.02 / sqrt(2 layers), so that at the start the stream ends at nearly the same size at any depth."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocabulary, config.width))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.width))
        self.head = None if config.tied else nn.Parameter(torch.empty(config.vocabulary, config.width))
        cos, sin = rotation_tables(config)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith((".out", ".down"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)

    @property
    def unembedding(self) -> Float[Tensor, "v c"]:
        """The weight that turns the final stream into logits."""
        return self.embedding if self.head is None else self.head

    def hidden(
        self,
        ids: Int[Tensor, "b t"],
        *,
        cache: Cache | None = None,
        positions: Int[Tensor, "b t"] | None = None,
        visible: Bool[Tensor, "b t s"] | None = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "b t c"]:
        """The normalised stream before the head, for a loss or a decoder that does not want all logits.

        `positions` and `visible` (True: may be looked at) are for padding and packed documents; without them positions
        count on from the cache and every token sees what came before. `routings` collects one entry for each MoE layer.
        """
        start, t = (0 if cache is None else cache.length), ids.shape[1]
        if start + t > self.config.context:
            raise ValueError(f"the context is {self.config.context} tokens, {start + t} are needed")
        x = F.embedding(ids, self.embedding)
        rows = slice(start, start + t) if positions is None else positions
        cos, sin = self.cos[rows].to(x.dtype), self.sin[rows].to(x.dtype)
        if positions is not None:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # the same for all heads
        for block in self.blocks:
            x = block(x, cos, sin, cache, visible, routings)
        if cache is not None:
            cache.length += t
        return rms_norm(x, self.norm, eps=self.config.eps)

    def forward(
        self,
        ids: Int[Tensor, "b t"],
        *,
        cache: Cache | None = None,
        positions: Int[Tensor, "b t"] | None = None,
        visible: Bool[Tensor, "b t s"] | None = None,
        routings: list[Routing] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token after each position; keywords as in `hidden`."""
        x = self.hidden(ids, cache=cache, positions=positions, visible=visible, routings=routings)
        return F.linear(x, self.unembedding)
