"""The kernels of one layer, each with random inputs of its own, under any mix of adapters; and what float64 says."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gpu import launch
from kernels.gpu.lora_expand import lora_expand
from kernels.gpu.lora_shrink import lora_shrink
from kernels.gpu.rotary_store_kv import rotary_store_kv
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.reference import silu_and_mul as silu_and_mul_twin
from kernels.reference_lora import lora_expand as expand_twin
from kernels.reference_lora import lora_shrink as shrink_twin
from kernels.work_list import LoraDelta, WorkList
from tests.kernels.cases import DEVICE, RANKS, lora_case, popularity, randn
from tests.kernels.test_rotary_store_kv import BLOCK_SIZE, EPS, norms_of, run_twin, slots, tables

ALL_RANKS = [*RANKS, 16]  # every adapter from the third on lacks one of a site's modules, the last one the only one
BASE = -1


class LayerShape(NamedTuple):
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    has_norms: bool  # of heads


def mixes(num_rows: int) -> dict[str, list[int]]:
    """The adapter of each row: every adapter alone, and all of them together in several shares."""
    alone = {f"identical, rank {rank}, {i}": [i] * num_rows for i, rank in enumerate(ALL_RANKS)}
    names = ("uniform", "zipf", "distinct")
    return alone | {name: popularity(name, num_rows, len(ALL_RANKS), 1) for name in names}


class Layer:
    """Its LoRA sites, all with the same adapters, whose rows may be changed; inputs and outputs at fixed addresses."""

    def __init__(self, shape: LayerShape, num_rows: int, dtype: torch.dtype, has_answers: bool = False) -> None:
        """has_answers: see Step; it decides which kinds of segments there are."""
        self.shape, self.num_rows, self.dtype, self.has_answers = shape, num_rows, dtype, has_answers
        q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        sizes: dict[str, tuple[int, tuple[int, ...]]] = {
            "qkv": (shape.hidden, (q, kv, kv)),
            "o": (q, (shape.hidden,)),
            "gate_up": (shape.hidden, (shape.intermediate,) * 2),
            "down": (shape.intermediate, (shape.hidden,)),
        }
        self.cases = {
            name: lora_case([BASE] * num_rows, ALL_RANKS, k, outs, dtype, 2, 2 if len(outs) > 1 else len(RANKS))
            for name, (k, outs) in sizes.items()
        }
        self.x = {name: randn(3 + i, num_rows, sizes[name][0], dtype=dtype) for i, name in enumerate(sizes)}
        self.y = {name: randn(9 + i, num_rows, sum(sizes[name][1]), dtype=dtype) for i, name in enumerate(sizes)}
        self.norms = norms_of(shape.head_dim, dtype) if shape.has_norms else None
        self.angles = tables(num_rows, shape.head_dim, dtype)
        self.slots, num_blocks = slots(num_rows)
        size = (num_blocks, 2, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
        self.cache = torch.zeros(size, dtype=dtype, device=DEVICE)[:, 1]

    def set_mix(self, mix: list[int]) -> None:
        self.cases = {name: case.with_rows(mix) for name, case in self.cases.items()}

    @property
    def base_rows(self) -> list[int]:
        return sorted(set(range(self.num_rows)) - set(self.cases["o"].lora_rows()))

    def work_lists(self, changes: bool = True) -> dict[str, WorkList]:
        """As a step of so many rows has them."""
        shape = launch.block_rows(self.num_rows), launch.long_rows(self.num_rows, self.has_answers)
        return {name: case.work_list(*shape, changes) for name, case in self.cases.items()}

    def update(self, works: dict[str, WorkList]) -> None:
        for name, work in works.items():
            work.update(self.num_rows, self.cases[name].adapters())

    def shrink(self, works: dict[str, WorkList]) -> dict[str, Tensor]:
        return {
            name: lora_shrink(self.x[name], case.chunks, case.site, works[name]) for name, case in self.cases.items()
        }

    def run(self, works: dict[str, WorkList] | None) -> dict[str, Tensor]:
        """What stands behind each op; without work lists that of the base model. A graph can capture it."""
        s = self.shrink(works) if works else {}
        deltas = {name: LoraDelta(s[name], self.cases[name].chunks, self.cases[name].site, works[name]) for name in s}
        q, heads = self.y["qkv"].clone(), self.shape.num_heads
        delta = deltas.get("qkv")
        rotary_store_kv(q, *self.angles, self.cache, self.slots, heads, self.norms, EPS, delta, self.has_answers)
        kv = self.cache[self.slots // BLOCK_SIZE, :, :, self.slots % BLOCK_SIZE].flatten(1)
        outs = {"q": q[:, : heads * self.shape.head_dim], "kv": kv}
        outs["gate_up"] = silu_and_mul(self.y["gate_up"], deltas.get("gate_up"))
        for name in ("o", "down"):
            outs[name] = self.y[name].clone()
            if works:
                lora_expand(outs[name], s[name], self.cases[name].chunks, self.cases[name].site, works[name])
        return outs

    def expected(self) -> dict[str, Tensor]:
        """run's results in float64, from the same inputs."""
        shape, used = self.shape, bool(self.cases["qkv"].used)
        case, x = (self.cases["qkv"], self.x["qkv"]) if used else (None, None)
        q, kv = run_twin(self.y["qkv"], shape.num_heads, shape.num_kv_heads, self.norms, case, x)
        wide = {}
        for name in ("gate_up", "o", "down"):
            wide[name] = self.y[name].double().cpu()
            if used:
                self._expand(name, wide[name])
        return {"q": q, "kv": kv} | wide | {"gate_up": silu_and_mul_twin(wide["gate_up"])}

    def _expand(self, name: str, y: Tensor) -> None:
        case, segments = self.cases[name], self.cases[name].segments()
        assert segments is not None
        chunks = case.chunks.double().cpu()
        expand_twin(
            y, shrink_twin(self.x[name].double().cpu(), chunks, case.site, segments), chunks, case.site, segments
        )
