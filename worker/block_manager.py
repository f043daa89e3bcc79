"""BlockManager: which KV block belongs to which sequences, shared prefixes included.

A block is free when no sequence refers to it. A free block may still hold a prefix that the cache can find; such
blocks are taken for new content last, and among them the longest unused first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from worker.prefix_cache import HashBlock, Prefix, PrefixCache
from worker.sequence import Sequence


@dataclass(slots=True)
class Block:
    """One KV block: how many sequences refer to it, and the prefix that it completes once it is full and computed."""

    num_references: int = 0
    prefix: Prefix | None = None


class BlockManager:
    """Hands out the blocks of one KV cache."""

    def __init__(self, num_blocks: int, block_size: int, hash_block: HashBlock | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # taken from the front
        self._cache = PrefixCache(block_size, hash_block)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def attach_prefix(self, sequence: Sequence) -> int:
        """Gives a sequence without blocks the cached ones that its tokens begin with; returns the tokens found.

        At least one token stays to be computed, since the next token comes from its logits.
        """
        assert not sequence.block_table and sequence.num_computed_tokens == 0
        if sequence.sampling.prompt_logprobs is not None:
            return 0  # they come of computing the whole prompt
        found = self._cache.find(sequence.namespace, sequence.token_ids, len(sequence.token_ids) - 1)
        for block_id in found:
            self._blocks[block_id].num_references += 1
            self._free.pop(block_id, None)
        sequence.block_table.extend(found)
        sequence.num_computed_tokens = len(found) * self.block_size
        return sequence.num_computed_tokens

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes block_table cover the next num_tokens tokens. False if the blocks are not there; nothing changes."""
        missing = self.blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block_id, _ = self._free.popitem(last=False)
            block = self._blocks[block_id]
            self._cache.drop(block.prefix, block_id)
            block.prefix, block.num_references = None, 1
            sequence.block_table.append(block_id)
        return True

    def publish(self, sequence: Sequence, start: int, end: int) -> None:
        """Takes note that the tokens from start to end, all known, are computed; blocks that became full can be shared.

        To be called in order: what stands before start has been published.
        """
        assert end <= len(sequence.token_ids), "a block is found by what it holds, so all of it must be known"
        size, table = self.block_size, sequence.block_table
        for index in range(start // size, end // size):
            parent = self._blocks[table[index - 1]].prefix if index else self._cache.root(sequence.namespace)
            assert parent is not None
            prefix = self._cache.child(parent, sequence.token_ids[index * size : (index + 1) * size])
            self._blocks[table[index]].prefix = self._cache.add(prefix, table[index])

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks from a sequence."""
        for block_id in reversed(sequence.block_table):  # the end of a prefix is of no use without its beginning
            block = self._blocks[block_id]
            block.num_references -= 1
            if block.num_references:
                continue
            self._free[block_id] = None
            if not self._cache.holds(block.prefix, block_id):
                self._free.move_to_end(block_id, last=False)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that the books agree with the block tables of all sequences."""
        sequences = list(sequences)
        references = Counter(block_id for sequence in sequences for block_id in sequence.block_table)
        for block_id, block in enumerate(self._blocks):
            assert block.num_references == references[block_id] >= 0
            assert (block_id in self._free) == (block.num_references == 0)
        assert len(self._free) + len(references) == self.num_blocks
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert 0 <= sequence.num_computed_tokens <= sequence.num_tokens
            assert len(sequence.block_table) >= self.blocks_for(sequence.num_computed_tokens)
        for prefix, block_id in self._cache.items():
            assert self._blocks[block_id].prefix is prefix
