"""The prefix cache: full KV blocks found again by what they hold.

A block's key is a hash over its parent's key and its own token ids, so a key stands for a whole prefix; the chain
starts at the namespace (adapter content and cache salt). A hash only finds candidates: what decides is the comparison
of the stored token ids along the chain, so a collision, made or met, costs a miss and never a wrong answer.
"""

import hashlib
import secrets
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HashBlock = Callable[[bytes, bytes], bytes]  # (the parent's key, what the block holds) -> key


@dataclass(slots=True, frozen=True, eq=False)
class Prefix:
    """Everything up to the end of one full block; the root of a chain has no parent and names the namespace."""

    key: bytes
    parent: "Prefix | None"
    content: bytes  # the block's token ids, or at the root the namespace

    def same_as(self, other: "Prefix") -> bool:
        """Whether both stand for the same tokens in the same namespace; exact whatever the hash."""
        a: Prefix | None = self
        b: Prefix | None = other
        while a is not b:  # chains that were found in the cache meet at once
            if a is None or b is None or a.content != b.content:
                return False
            a, b = a.parent, b.parent
        return True


def seeded_hash() -> HashBlock:
    """A hash that nobody outside can aim at: keyed with a secret drawn anew at each boot."""
    seed = secrets.token_bytes(32)

    def hash_block(parent_key: bytes, content: bytes) -> bytes:
        return hashlib.blake2b(parent_key + content, key=seed, digest_size=16).digest()

    return hash_block


class PrefixCache:
    """Which block holds which prefix. Knows nothing of who uses a block."""

    def __init__(self, block_size: int, hash_block: HashBlock | None = None) -> None:
        self._block_size = block_size
        self._hash = hash_block or seeded_hash()
        self._blocks: dict[bytes, tuple[Prefix, int]] = {}

    def root(self, namespace: bytes) -> Prefix:
        """The empty prefix of a namespace."""
        return Prefix(self._hash(b"", namespace), None, namespace)

    def child(self, parent: Prefix, token_ids: Sequence[int]) -> Prefix:
        """The prefix that is one full block longer."""
        content = array("q", token_ids).tobytes()
        return Prefix(self._hash(parent.key, content), parent, content)

    def find(self, namespace: bytes, token_ids: list[int], max_tokens: int) -> list[int]:
        """The blocks that hold the longest known beginning of token_ids, of at most max_tokens tokens."""
        found: list[int] = []
        prefix = self.root(namespace)
        size = self._block_size
        for start in range(0, max_tokens - max_tokens % size, size):
            prefix = self.child(prefix, token_ids[start : start + size])
            known = self._blocks.get(prefix.key)
            if known is None or not known[0].same_as(prefix):
                break
            prefix = known[0]
            found.append(known[1])
        return found

    def add(self, prefix: Prefix, block_id: int) -> Prefix:
        """Makes a computed block findable, unless another one is under its key already.

        Returns the prefix to build children on: the known one where both are the same, so that chains stay shared.
        """
        known = self._blocks.setdefault(prefix.key, (prefix, block_id))[0]
        return known if known.same_as(prefix) else prefix

    def holds(self, prefix: Prefix | None, block_id: int) -> bool:
        """Whether this very block is what the cache answers for the prefix."""
        known = self._blocks.get(prefix.key) if prefix else None
        return known is not None and known[1] == block_id

    def drop(self, prefix: Prefix | None, block_id: int) -> None:
        """Forgets a block whose memory is about to hold something else."""
        if prefix is not None and self.holds(prefix, block_id):
            del self._blocks[prefix.key]

    def items(self) -> list[tuple[Prefix, int]]:
        """Every prefix and its block."""
        return list(self._blocks.values())
