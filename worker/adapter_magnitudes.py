"""DoRA's magnitudes, worked into an adapter when it is loaded: each row of W + ΔW is brought to a length of its own.

W' = m / ‖W + ΔW‖ · (W + ΔW), so that y = g · (x · Wᵀ) + g · (x · ΔWᵀ) with g = m / ‖W + ΔW‖, by rows (Liu et al., 2024,
arXiv 2402.09353). The second g goes into B here, and the first becomes a Rescale. As in PEFT, a bias is not scaled.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from worker.adapter_config import invalid
from worker.adapter_targets import Place, module_path
from worker.adapter_tensors import check_tensor, tensor_name
from worker.adapter_weights import LoraWeight, Rescale
from worker.checkpoint import Checkpoint

# Numbers of W that are looked at together. 14336 rows of 4096 on a core of an EPYC, ms: 28 in pieces of 1 Mi, which
# stay in the cache and in memory that is reused, 30 of 256 Ki, 95 of 2 Mi, 127 of 8 Mi.
PIECE = 1 << 20


def fold_magnitudes(
    weights: Mapping[Place, LoraWeight], base: Checkpoint
) -> tuple[dict[Place, LoraWeight], dict[Place, Rescale]]:
    """Weights without magnitudes, and what happens to the base's share. base: of the model that the adapter is for.

    Reads all weights that are targeted, a few rows at a time: seconds for a model of billions. Raises AdapterError.
    """
    folded, rescales = {}, {}
    for place, weight in weights.items():
        assert weight.magnitude is not None
        for half, tensor in (("A", weight.a), ("B", weight.b), ("magnitude", weight.magnitude)):
            check_tensor(place, half, tensor, torch.float32)
        norms = _row_norms(f"{module_path(*place)}.weight", weight, base)
        gain = weight.magnitude.float() / norms
        if not bool((norms.isfinite() & gain.isfinite()).all()):
            raise invalid(
                f"{tensor_name(place, 'magnitude')}: the weights that it scales have a row of zeros, or numbers beyond"
                " float32"
            )
        bias = f"{module_path(*place)}.bias"
        shift = (1 - gain) * base.rows(bias, 0, len(gain)).float() if bias in base else torch.zeros_like(gain)
        folded[place] = replace(weight, b=weight.b.float() * gain[:, None], magnitude=None)
        rescales[place] = Rescale(gain - 1, shift)
    return folded, rescales


def _row_norms(name: str, weight: LoraWeight, base: Checkpoint) -> Tensor:
    """‖W + ΔW‖ of every row, float32 [out_features]."""
    a, b = weight.a.float() * weight.scale, weight.b.float()
    num_rows = max(1, PIECE // a.shape[1])
    norms = torch.empty(len(b))
    for start in range(0, len(b), num_rows):
        stop = min(start + num_rows, len(b))
        merged = base.rows(name, start, stop).float().addmm_(b[start:stop], a)
        torch.linalg.vector_norm(merged, dim=1, out=norms[start:stop])
    return norms


def check_rescales(rescales: Mapping[Place, Rescale], dtype: torch.dtype) -> None:
    """Refuses what is beyond the model's dtype. Raises AdapterError."""
    for place, rescale in rescales.items():
        if not math.isfinite(float(rescale.rows(dtype).float().abs().max())):
            raise invalid(f"{tensor_name(place, 'magnitude')} scales by more than the model's dtype holds")
