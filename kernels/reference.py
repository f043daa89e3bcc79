"""Torch twins of the kernels: what each op means, on any device. The CPU runs these."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference_lora import lora_expand
from kernels.segments import Segments
from kernels.work_list import LoraDelta


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


# On a CPU torch hands x · Wᵀ to a kernel that is fast for 1 to 3 rows, slow for some more and good again for many;
# W · xᵀ is the other way round. All linears of SmolLM2-135M in float32, 2 threads of a Xeon, ms, x · Wᵀ | W · xᵀ:
# 1 row 30 | 30, 2 rows 31 | 51, 3 rows 35 | 52, 4 rows 53 | 48, 8 rows 77 | 54, 32 rows 115 | 75, 64 rows 165 | 163.
# One layer's, 1 thread: 16 rows 2.3 | 1.8, 64 rows 5.3 | 4.9, 128 rows 9.3 | 9.1, 256 rows 18 | 24, 1024 rows 67 | 92.
# On an EPYC 1 row 32 | 32, on one thread whatever there are, 2 rows 55 | 15, 3 rows 72 | 17, 4 rows 49 | 16, 8 rows
# 43 | 32, 64 rows 115 | 113, 128 rows 189 | 204: there a row is best computed beside a second one, of zeros.
_FEW_ROWS = 0 if _is_amd() else 3
_MANY_ROWS = 65 if _is_amd() else 129


class Tokens(NamedTuple):
    """A step's tokens, as places in a table of ids."""

    codes: Tensor  # int64 [num_tokens]
    table: Tensor  # int64 [any size]

    def ids(self) -> Tensor:
        """int64 [num_tokens]."""
        return self.table.index_select(0, self.codes)


def embed(tokens: Tokens, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Semantics: weight[ids of the tokens], and as many zeros: the residual, to which layers add.

    weight [vocab_size, hidden_size] -> twice [num_tokens, hidden_size], which may be changed.
    """
    x = F.embedding(tokens.ids(), weight)
    return x, torch.zeros_like(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Semantics: y = x · Wᵀ + bias.

    x [num_rows, in_features], weight [out_features, in_features], bias [out_features] -> [num_rows, out_features],
    contiguous.
    """
    num_rows = x.shape[0]
    if x.is_cuda or not _FEW_ROWS < num_rows < _MANY_ROWS:
        return F.linear(x, weight, bias)
    if num_rows == 1:
        x = F.pad(x, (0, 0, 0, 1))
    y = torch.mm(weight, x.t())[:, :num_rows].t().contiguous()
    return y if bias is None else y.add_(bias)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Semantics: silu_and_mul(linear(x, weight, bias)). weight [2n, in_features] -> [num_rows, n]."""
    return silu_and_mul(linear(x, weight, bias))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: y = x / sqrt(mean(x²) + eps) * weight over the last dimension, in float32 inside.

    x [..., size], weight [size] -> [..., size] in x's dtype.
    """
    # Between two GEMMs, with cold caches, 55 µs where torch's own rms_norm takes 77: it is made of more ops.
    wide = x.float()
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse_rms = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse_rms).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: residual += x (in place); y = rms_norm(residual, weight, eps).

    x, residual [num_tokens, size], weight [size] -> [num_tokens, size].
    """
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> None:
    """Semantics: rotates each head by its token's position, in place: x = x * cos + swap_halves(x) * signed_sin.

    x [num_tokens, num_heads, head_dim]; cos, signed_sin [num_tokens, 1, head_dim], where signed_sin's first half is
    negated, which makes the sum the rotation of (first half, second half) pairs.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    x.mul_(cos).addcmul_(swapped, signed_sin)


def silu_and_mul(x: Tensor, delta: LoraDelta | None = None) -> Tensor:
    """Semantics: y = silu(x[:, :n]) * x[:, n:], after lora_expand(x, delta). x may be changed.

    x [num_tokens, 2n] -> [num_tokens, n].
    """
    if delta is not None:
        _expand(x, delta)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def store_kv(kv: Tensor, cache: Tensor, slot_blocks: Tensor, slot_offsets: Tensor) -> None:
    """Semantics: cache[slot_blocks[token], :, :, slot_offsets[token]] = kv[token].

    kv [num_tokens, 2, num_kv_heads, head_dim]; cache: one layer of the KV cache,
    [num_blocks, 2, num_kv_heads, block_size, head_dim]; slot_blocks, slot_offsets int64 [num_tokens], no slot twice.
    """
    cache[slot_blocks, :, :, slot_offsets] = kv


def rotary_store_kv(
    qkv: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor | tuple[Tensor, Tensor],
    num_heads: int,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    delta: LoraDelta | None = None,
    has_answers: bool = False,
) -> None:
    """Semantics: lora_expand(qkv, delta); rms_norm of each head of q and k; rotary of q and k; store_kv.

    qkv [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim], whose queries are changed in place and whose keys and
    values may be; cache: one layer, [num_blocks, 2, num_kv_heads, block_size, head_dim]; head_norms: the weights
    [head_dim] of queries and keys. cos and signed_sin as in rotary; slot_mapping int64 [num_tokens]: block id times
    block_size plus offset, no slot twice; or block ids and offsets, taken apart once for all layers. has_answers: of
    kernels alone, for their tiles.
    """
    num_tokens, num_kv_heads, head_dim = qkv.shape[0], cache.shape[2], cache.shape[4]
    if delta is not None:
        _expand(qkv, delta)
    heads = qkv.view(num_tokens, -1, head_dim)
    q, k = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads]
    if head_norms is not None:
        q.copy_(rms_norm(q, head_norms[0], eps))
        k.copy_(rms_norm(k, head_norms[1], eps))
    rotary(heads[:, :-num_kv_heads], cos, signed_sin)
    kv = heads[:, num_heads:].view(num_tokens, 2, num_kv_heads, head_dim)
    if isinstance(slot_mapping, Tensor):
        slot_mapping = slot_mapping // cache.shape[3], slot_mapping % cache.shape[3]
    store_kv(kv, cache, *slot_mapping)


def argmax(logits: Tensor) -> Tensor:
    """Semantics: the first of each row's largest values; -1 for a row of only -infinity, or with a NaN or +infinity.

    logits [num_rows, vocab_size] -> int64 [num_rows].
    """
    best = logits.max(dim=-1).values  # a NaN is its row's maximum
    return logits.argmax(dim=-1).masked_fill_(~best.isfinite(), -1)


def _expand(y: Tensor, delta: LoraDelta) -> None:
    assert isinstance(delta.segments, Segments)
    lora_expand(y, delta.s, delta.chunks, delta.site, delta.segments)


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One sequence's several rows of a step, for attention. See AttentionPlan."""

    rows: slice
    kv_rows: Tensor  # of the sequence's blocks, see kv_rows
    context_len: int  # tokens with KV, this step's included
    mask: Tensor | None  # bool [num rows, context_len], True is seen; None: causal from the first token


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Several sequences' single rows of a step, which attend together. See AttentionPlan."""

    rows: Tensor  # int64 [num_decodes], of the flat batch, ascending
    kv_rows: Tensor  # of the sequences' blocks, as many blocks for each, see kv_rows
    context_len: int  # the longest context, tokens
    mask: Tensor | None  # [num_decodes, 1, 1, context_len], 0 is seen, -inf not; None: all see all


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the rows of a step attend: built once a step, used by every layer.

    A row that is its sequence's only one is a decode, and decodes of similar contexts are a group. The rest are
    prefill spans. Each row is in one of them.
    """

    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillSpan, ...]


def paged_attention(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Semantics: softmax(scale * q · Kᵀ) · V for each row, over its sequence's tokens that the plan lets it see.

    q [num_tokens, num_heads, head_dim]; cache: one layer, [num_blocks, 2, num_kv_heads, block_size, head_dim], in which
    the step's own keys and values stand already; consecutive query heads share a KV head. -> as q, contiguous.
    """
    if len(plan.decodes) == 1 and not plan.prefills:
        return _attend_decodes(q, cache, plan.decodes[0], scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for group in plan.decodes:
        out[group.rows] = _attend_decodes(q[group.rows], cache, group, scale)
    for span in plan.prefills:
        out[span.rows] = _attend_prefill(q[span.rows], cache, span, scale)
    return out


def kv_rows(block_tables: Tensor, cache: Tensor) -> Tensor:
    """Where the keys and values of blocks stand, as rows of one (block, key or value, head) in the cache's memory.

    block_tables int64 [num_sequences, num_blocks]; cache: any layer, [num_blocks, 2, num_kv_heads, block_size,
    head_dim] -> int64 [num_sequences · 2 · num_kv_heads · num_blocks], in the order in which attention reads them.
    """
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    rows_per_block = cache.stride(0) // (block_size * head_dim)
    kv_heads = torch.arange(2 * num_kv_heads, device=block_tables.device)[None, :, None]
    return (block_tables[:, None, :] * rows_per_block + kv_heads).flatten()


def gather_kv(cache: Tensor, rows: Tensor, num_sequences: int) -> Tensor:
    """The keys and values of kv_rows, in one copy.

    -> [num_sequences, 2, num_kv_heads, num_blocks · block_size, head_dim].
    """
    num_cache_blocks, _, num_kv_heads, block_size, head_dim = cache.shape
    size = block_size * head_dim
    num_rows = (num_cache_blocks - 1) * (cache.stride(0) // size) + 2 * num_kv_heads
    memory = cache.as_strided((num_rows, size), (size, 1), cache.storage_offset())
    return memory.index_select(0, rows).view(num_sequences, 2, num_kv_heads, -1, head_dim)


def _attend_decodes(q: Tensor, cache: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    """q [num_decodes, num_heads, head_dim]. The query heads of one KV head pass for its query positions."""
    num_decodes, num_heads, head_dim = q.shape
    keys, values = gather_kv(cache, group.kv_rows, num_decodes)[..., : group.context_len, :].unbind(1)
    grouped = q.reshape(num_decodes, keys.shape[1], -1, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale)
    return out.reshape(num_decodes, num_heads, head_dim)


def _attend_prefill(q: Tensor, cache: Tensor, span: PrefillSpan, scale: float) -> Tensor:
    """q [num_rows, num_heads, head_dim] of one sequence."""
    kv = gather_kv(cache, span.kv_rows, 1)[0, :, :, : span.context_len]
    num_groups = q.shape[1] // kv.shape[1]
    keys, values = kv.repeat_interleave(num_groups, dim=1) if num_groups > 1 else kv
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1), keys, values, attn_mask=span.mask, is_causal=span.mask is None, scale=scale
    )
    return out.transpose(0, 1)
