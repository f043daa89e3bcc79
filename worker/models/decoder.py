"""The decoder of the Llama family: Llama, Mistral, Qwen2 and Qwen3 differ in biases, head norms and a window."""

import copy
from typing import Protocol

import torch
from torch import Tensor

from kernels import Edges, EdgeSite, LoraSite, Tokens, add_embeddings, add_logits
from worker.chunk_layout import CHUNK_RANK, MODULES, ChunkLayout
from worker.layers.linear import Linear
from worker.layers.ops import TORCH, Ops
from worker.layers.rotary_embedding import RotaryEmbedding
from worker.layers.step import Step
from worker.model_config import ModelConfig


class Weights(Protocol):
    """Where a model's tensors come from: worker.weights.WeightReader."""

    dtype: torch.dtype
    device: torch.device

    def __contains__(self, name: str) -> bool: ...
    def take(self, name: str, *shape: int) -> Tensor: ...
    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor: ...


class Attention:
    """Grouped-query attention over the paged KV cache, with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, layout: ChunkLayout, ops: Ops) -> None:
        self.layer = layer
        self.num_heads, self.head_dim, self.q_size = config.num_heads, config.head_dim, config.q_size
        self.eps = config.rms_norm_eps
        self._ops = ops
        prefix = f"model.layers.{layer}.self_attn."
        outs = (config.q_size, config.kv_size, config.kv_size)
        self.qkv_proj = _linear(weights, layout, ops, prefix, layer, "qkv_proj", outs, config.qkv_bias)
        self.o_proj = _linear(weights, layout, ops, prefix, layer, "o_proj", (config.hidden_size,), config.o_bias)
        self.head_norms: tuple[Tensor, Tensor] | None = None  # weights of queries and keys
        if config.qk_norm:
            q_norm = weights.take(f"{prefix}q_norm.weight", config.head_dim)
            self.head_norms = (q_norm, weights.take(f"{prefix}k_norm.weight", config.head_dim))

    def __call__(self, x: Tensor, residual: Tensor, cos: Tensor, signed_sin: Tensor, step: Step) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape. residual as in Linear."""
        num_tokens, cache = x.shape[0], step.kv_layers[self.layer]
        qkv, delta = self.qkv_proj.with_delta(x, step.lora)
        self._ops.rotary_store_kv(
            qkv, cos, signed_sin, cache, step.slot_mapping, self.num_heads, self.head_norms, self.eps, delta,
            step.has_answers,
        )  # fmt: skip
        q = qkv[:, : self.q_size].view(num_tokens, self.num_heads, self.head_dim)
        out = self._ops.paged_attention(q, cache, step.attention, self.head_dim**-0.5)
        return self.o_proj(out.view(num_tokens, -1), residual, step.lora)


class Mlp:
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, layout: ChunkLayout, ops: Ops) -> None:
        self._ops = ops
        prefix = f"model.layers.{layer}.mlp."
        outs = (config.intermediate_size, config.intermediate_size)
        hidden, has_bias = config.hidden_size, config.mlp_bias
        self.gate_up_proj = _linear(weights, layout, ops, prefix, layer, "gate_up_proj", outs, has_bias)
        self.down_proj = _linear(weights, layout, ops, prefix, layer, "down_proj", (hidden,), has_bias)

    def __call__(self, x: Tensor, residual: Tensor, step: Step) -> Tensor:
        """x [num_tokens, hidden_size] -> the same shape. residual as in Linear."""
        if step.lora is None:
            return self.down_proj(self.gate_up_proj.gated(x), residual, None)
        gate_up, delta = self.gate_up_proj.with_delta(x, step.lora)
        return self.down_proj(self._ops.silu_and_mul(gate_up, delta), residual, step.lora)


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int, weights: Weights, layout: ChunkLayout, ops: Ops) -> None:
        prefix = f"model.layers.{layer}."
        self.eps = config.rms_norm_eps
        self._add_rms_norm = ops.add_rms_norm
        self.attention = Attention(config, layer, weights, layout, ops)
        self.mlp = Mlp(config, layer, weights, layout, ops)
        self.input_norm = weights.take(f"{prefix}input_layernorm.weight", config.hidden_size)
        self.post_attention_norm = weights.take(f"{prefix}post_attention_layernorm.weight", config.hidden_size)

    def __call__(self, x: Tensor, residual: Tensor, cos: Tensor, signed_sin: Tensor, step: Step) -> Tensor:
        """x: the layer before's output, not yet added to the residual, which is changed in place."""
        normed = self._add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(normed, residual, cos, signed_sin, step)
        return self.mlp(self._add_rms_norm(x, residual, self.post_attention_norm, self.eps), residual, step)


class Decoder:
    """The whole model. Built by asking `weights` for every tensor by its checkpoint name."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops = TORCH) -> None:
        layout = config.chunk_layout()
        self.eps = config.rms_norm_eps
        self._ops = ops
        self._edge_site = _edge_site(layout)
        self.embed_tokens = weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer, weights, layout, ops) for layer in range(config.num_layers)]
        self.norm = weights.take("model.norm.weight", config.hidden_size)
        self.lm_head = _lm_head(config, weights, self.embed_tokens)
        self.rotary_embedding = RotaryEmbedding(
            config.rope, config.head_dim, config.max_position_embeddings, weights.dtype, weights.device
        )

    def shallow(self) -> "Decoder":
        """This model with its first layer alone: it launches the kernels of the whole, in fewer launches."""
        model = copy.copy(self)
        model.layers = self.layers[:1]
        return model

    def forward(self, tokens: Tokens, step: Step) -> Tensor:
        """Hidden states [num_tokens, hidden_size], before the last norm."""
        cos, signed_sin = self.rotary_embedding(step.positions)
        x, residual = self._ops.embed(tokens, self.embed_tokens)
        if step.edges is not None:
            assert self._edge_site is not None
            add_embeddings(x, tokens.ids(), self._edge_site, step.edges)
        for layer in self.layers:
            x = layer(x, residual, cos, signed_sin, step)
        return residual.add_(x)

    def logits(self, hidden: Tensor, edges: Edges | None = None) -> Tensor:
        """hidden [num_rows, hidden_size] of the rows that sample -> [num_rows, vocab_size], in the model's dtype.

        edges: of those among these rows whose adapter changes the head.
        """
        normed = self._ops.rms_norm(hidden, self.norm, self.eps)
        logits = self._ops.linear(normed, self.lm_head, None)
        if edges is not None:
            assert self._edge_site is not None
            add_logits(logits, normed, self._edge_site, edges)
        return logits


def _edge_site(layout: ChunkLayout) -> EdgeSite | None:
    edges = layout.edges
    return None if edges is None else EdgeSite(edges.vocab_size, edges.hidden_size, CHUNK_RANK, *edges.offsets())


def _linear(
    weights: Weights,
    layout: ChunkLayout,
    ops: Ops,
    prefix: str,
    layer: int,
    group: str,
    outs: tuple[int, ...],
    has_bias: bool,
) -> Linear:
    """The linear of a group of modules, their weights merged in the group's order."""
    place = layout.groups[group]
    start = layer * layout.layer_size
    site = LoraSite(
        layer=layer,
        first_module=MODULES.index(place.modules[0]),
        in_features=place.in_features,
        out_features=outs,
        a_offset=start + place.a_offset,
        b_offset=start + place.b_offset,
        chunk_rank=CHUNK_RANK,
    )
    named = list(zip(place.modules, outs, strict=True))
    weight = weights.merge([(f"{prefix}{module}.weight", rows) for module, rows in named], place.in_features)
    bias = weights.merge([(f"{prefix}{module}.bias", rows) for module, rows in named]) if has_bias else None
    return Linear(weight, bias, site, ops)


def _lm_head(config: ModelConfig, weights: Weights, embed_tokens: Tensor) -> Tensor:
    if config.tie_word_embeddings:
        return embed_tokens
    return weights.take("lm_head.weight", config.vocab_size, config.hidden_size)
