"""Where things lie inside an adapter chunk: a rank-16 slice of every layer and module, packed as the kernels read it.

An adapter of rank r is ceil(r / 16) chunks of equal size, and its ΔW is the sum of its chunks' products, so ranks mix
freely and nothing is padded to a maximum. Rank paging is S-LoRA's idea (Sheng et al., 2023, arXiv 2311.03285).

    chunk  = layer 0 | layer 1 | ...
    layer  = qkv_proj: A [3·16, hidden], B [q+k+v, 16] | o_proj: A [16, q], B [hidden, 16]
           | gate_up_proj: A [2·16, hidden], B [2·intermediate, 16] | down_proj: A [16, intermediate], B [hidden, 16]

Behind these an adapter may have chunks of two other kinds, of the same size, so that the pool knows only one:

    magnitudes (DoRA), one  = laid out as above, with [4, out] in the place of each B: see kernels.Rescaled
    edges, rank-16 slices   = embed_tokens: Aᵀ [vocab, 16], B [hidden, 16] | lm_head: A [16, hidden], B [vocab, 16]
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

EDGES = ("embed_tokens", "lm_head")  # what stands outside of the layers
ALL_MODULES = (*MODULES, *EDGES)


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One group's place in a layer of a chunk. Offsets and sizes are in elements."""

    modules: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]  # of each module
    a_offset: int  # of A [len(modules) · 16, in_features], from the layer's start
    b_offset: int  # of B [sum(out_features), 16], from the layer's start


@dataclass(frozen=True, slots=True)
class EdgeLayout:
    """What a chunk of edges holds. Elements, not bytes."""

    vocab_size: int
    hidden_size: int
    is_tied: bool  # the head's weights are the embeddings'

    def offsets(self) -> tuple[int, int, int, int]:
        """Of the embeddings' A and B and the head's A and B."""
        of_vocab, of_hidden = CHUNK_RANK * self.vocab_size, CHUNK_RANK * self.hidden_size
        return 0, of_vocab, of_vocab + of_hidden, of_vocab + 2 * of_hidden

    @property
    def size(self) -> int:
        return 2 * CHUNK_RANK * (self.vocab_size + self.hidden_size)


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """The layout of a model's chunks. Elements, not bytes."""

    num_layers: int
    groups: dict[str, GroupLayout]
    layer_size: int
    edges: EdgeLayout | None = None  # None: they do not fit into a chunk, as in a model of next to no layers

    @property
    def chunk_size(self) -> int:
        return self.num_layers * self.layer_size

    @classmethod
    def of(
        cls,
        num_layers: int,
        hidden_size: int,
        q_size: int,
        kv_size: int,
        intermediate_size: int,
        vocab_size: int = 0,
        is_tied: bool = False,
    ) -> "ChunkLayout":
        """The layout for a Llama-shaped model: q_size and kv_size are heads times head size.

        vocab_size: 0 for a model whose embeddings and head no adapter may change.
        """
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
        edges = EdgeLayout(vocab_size, hidden_size, is_tied)
        fits = vocab_size > 0 and edges.size <= num_layers * offset
        return cls(num_layers, groups, offset, edges if fits else None)

    @staticmethod
    def num_chunks(rank: int) -> int:
        """How many chunks an adapter of this rank takes."""
        return -(-rank // CHUNK_RANK)
