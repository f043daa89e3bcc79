"""Where things lie inside an adapter chunk: a rank-16 slice of every layer and module, packed as the kernels read it.

An adapter of rank r is ceil(r / 16) chunks of equal size, and its ΔW is the sum of its chunks' products, so ranks mix
freely and nothing is padded to a maximum. Rank paging is S-LoRA's idea (Sheng et al., 2023, arXiv 2311.03285).

    chunk  = layer 0 | layer 1 | ...
    layer  = qkv_proj: A [3·16, hidden], B [q+k+v, 16] | o_proj: A [16, q], B [hidden, 16]
           | gate_up_proj: A [2·16, hidden], B [2·intermediate, 16] | down_proj: A [16, intermediate], B [hidden, 16]
"""

from dataclasses import dataclass

CHUNK_RANK = 16

# Modules by the group that computes them in one GEMM; a module's index in MODULES is its place in a scale table.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
MODULES: tuple[str, ...] = tuple(module for modules in GROUPS.values() for module in modules)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One group's place in a layer of a chunk. Offsets and sizes are in elements."""

    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]  # of each module
    a_offset: int  # of A [len(modules) · 16, in_features], from the layer's start
    b_offset: int  # of B [sum(out_features), 16], from the layer's start


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The layout of a model's chunks. Elements, not bytes."""

    num_layers: int
    groups: dict[str, GroupLayout]
    layer_size: int

    @property
    def chunk_size(self) -> int:
        return self.num_layers * self.layer_size

    @classmethod
    def of(cls, num_layers: int, hidden_size: int, q_size: int, kv_size: int, intermediate_size: int) -> "ChunkLayout":
        """The layout for a Llama-shaped model: q_size and kv_size are heads times head size."""
        shapes = {
            "qkv_proj": (hidden_size, (q_size, kv_size, kv_size)),
            "o_proj": (q_size, (hidden_size,)),
            "gate_up_proj": (hidden_size, (intermediate_size, intermediate_size)),
            "down_proj": (intermediate_size, (hidden_size,)),
        }
        groups: dict[str, GroupLayout] = {}
        offset = 0
        for name, modules in GROUPS.items():
            in_features, out_features = shapes[name]
            a_size = len(modules) * CHUNK_RANK * in_features
            groups[name] = GroupLayout(modules, in_features, out_features, offset, offset + a_size)
            offset += a_size + sum(out_features) * CHUNK_RANK
        return cls(num_layers, groups, offset)

    @staticmethod
    def num_chunks(rank: int) -> int:
        """How many chunks an adapter of this rank takes."""
        return -(-rank // CHUNK_RANK)
