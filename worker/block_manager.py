"""BlockManager: which KV block belongs to which sequences, shared prefixes included.

A block is used while sequences refer to it. One that nobody uses may still hold a prefix that the cache can find; such
cached blocks are taken for new content when nothing is free, the longest unused first. The memory is the arena's.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from worker.arena import Arena
from worker.prefix_cache import HashBlock, Prefix, PrefixCache
from worker.sequence import Sequence


@dataclass(slots=True)
class Block:
    """One KV block: how many sequences refer to it, and the prefix that it completes once it is full and computed."""

    num_references: int = 0
    prefix: Prefix | None = None


class BlockManager:
    """Hands out the blocks of one KV cache."""

    def __init__(
        self, num_blocks: int, block_size: int, hash_block: HashBlock | None = None, arena: Arena | None = None
    ) -> None:
        """num_blocks: the most that are held at once. arena: shared with adapters; by default KV is alone in one."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._arena = arena or Arena(num_blocks)
        self._arena.kv = self
        self._blocks = [Block() for _ in range(self._arena.num_pages * self._arena.blocks_per_page)]
        self._cached: OrderedDict[int, int] = OrderedDict()  # block → tick of its last use; the first to go first
        self._num_used = 0
        self._cache = PrefixCache(block_size, hash_block)

    @property
    def num_free(self) -> int:
        """Blocks that sequences can have: free ones, and what cached blocks and idle adapters would give up."""
        return self.num_free_beside(0)

    def num_free_beside(self, num_chunks: int) -> int:
        """The same, when so many chunks that are free or idle come into use."""
        arena = self._arena
        in_use_then = num_chunks if arena.adapters is not None else 0  # else they come from another memory
        num_pages = arena.num_free_pages + arena.num_idle_chunks - in_use_then
        in_arena = arena.num_free_blocks + len(self._cached) + num_pages * arena.blocks_per_page
        return min(in_arena, self.num_blocks - self._num_used)

    @property
    def has_free_pages(self) -> bool:
        """Whether memory is left that holds nothing at all, not even what is cached."""
        return self._arena.num_free_pages > 0

    @property
    def num_sure(self) -> int:
        """Blocks that one sequence can have in any case, whatever adapters there are."""
        return min(self.num_blocks, self._arena.num_sure_blocks)

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
            self._use(block_id)
        sequence.block_table.extend(found)
        sequence.num_computed_tokens = len(found) * self.block_size
        return sequence.num_computed_tokens

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes block_table cover the next num_tokens tokens. False if the blocks are not there; nothing changes."""
        missing = self.blocks_for(sequence.num_computed_tokens + num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        sequence.block_table.extend(self._take() for _ in range(missing))
        return True

    def _take(self) -> int:
        while True:
            has_place = self._num_used + len(self._cached) < self.num_blocks
            block_id = self._arena.take_block() if has_place else None
            if block_id is not None:
                self._blocks[block_id].num_references = 1
                self._num_used += 1
                return block_id
            if has_place:
                self._arena.reclaim_block()
            else:
                self.give_up()

    def _use(self, block_id: int) -> None:
        block = self._blocks[block_id]
        block.num_references += 1
        if block.num_references == 1:
            del self._cached[block_id]
            self._arena.use(block_id)
            self._num_used += 1

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
            self._num_used -= 1
            self._cached[block_id] = self._arena.rest(block_id)
            if not self._cache.holds(block.prefix, block_id):
                self.forget(block_id)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def step_planned(self) -> None:
        """A step is about to be launched: see arena."""
        self._arena.step_planned()

    # ------------------------------------------------------------------------------------------ for the arena

    @property
    def idle_since(self) -> int | None:
        """See arena.Idle."""
        return next(iter(self._cached.values()), None)

    def give_up(self) -> None:
        """See arena.Idle."""
        self.forget(next(iter(self._cached)))

    def forget(self, block_id: int) -> None:
        """Frees a cached block."""
        del self._cached[block_id]
        block = self._blocks[block_id]
        self._cache.drop(block.prefix, block_id)
        block.prefix = None
        self._arena.free_block(block_id)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that the books agree with the block tables of all sequences."""
        sequences = list(sequences)
        references = Counter(block_id for sequence in sequences for block_id in sequence.block_table)
        for block_id, block in enumerate(self._blocks):
            assert block.num_references == references[block_id] >= 0
            assert self._arena.holds(block_id) == (block.num_references > 0 or block_id in self._cached)
            assert not (block.num_references and block_id in self._cached)
        assert self._num_used == len(references) <= self.num_blocks - len(self._cached)
        self._arena.check_integrity()
        for sequence in sequences:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            assert 0 <= sequence.num_computed_tokens <= sequence.num_tokens
            assert len(sequence.block_table) >= self.blocks_for(sequence.num_computed_tokens)
        for prefix, block_id in self._cache.items():
            assert self._blocks[block_id].prefix is prefix
