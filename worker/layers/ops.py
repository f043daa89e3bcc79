"""Ops: what the layers are made of, by contract; chosen once, when the model is loaded.

The contract of each op stands at its torch twin in kernels.reference and kernels.reference_lora. A plan of attention
and the adapters' segments are whatever the same backend's input builder makes of a step: see Step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels import LoraDelta, LoraSite, Rescaled, Tokens, reference, reference_lora


@dataclass(frozen=True, slots=True)
class Ops:
    """One backend's ops."""

    embed: Callable[[Tokens, Tensor], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gated_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    rotary_store_kv: Callable[..., None]
    paged_attention: Callable[[Tensor, Tensor, Any, float], Tensor]
    silu_and_mul: Callable[[Tensor, LoraDelta | None], Tensor]
    lora_shrink: Callable[[Tensor, Tensor, LoraSite, Any], Tensor]
    lora_expand: Callable[[Tensor, Tensor, Tensor, LoraSite, Any], None]
    lora_rescale: Callable[[Tensor, Tensor, LoraSite, Rescaled], None]


TORCH = Ops(
    embed=reference.embed,
    linear=reference.linear,
    gated_linear=reference.gated_linear,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rotary_store_kv=reference.rotary_store_kv,
    paged_attention=reference.paged_attention,
    silu_and_mul=reference.silu_and_mul,
    lora_shrink=reference_lora.lora_shrink,
    lora_expand=reference_lora.lora_expand,
    lora_rescale=reference_lora.lora_rescale,
)


def triton_ops() -> Ops:
    """The Triton kernels. Imported here, so that a CPU server never loads Triton."""
    from kernels import gpu

    return Ops(
        embed=gpu.embed,
        linear=gpu.linear,
        gated_linear=gpu.gated_linear,
        rms_norm=gpu.rms_norm,
        add_rms_norm=gpu.add_rms_norm,
        rotary_store_kv=gpu.rotary_store_kv,
        paged_attention=gpu.paged_attention,
        silu_and_mul=gpu.silu_and_mul,
        lora_shrink=gpu.lora_shrink,
        lora_expand=gpu.lora_expand,
        lora_rescale=gpu.lora_rescale,
    )
