"""Blocks are shared by content, freed once, and never answer for what they do not hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.sampling import SamplingParams
from worker.block_manager import BlockManager
from worker.sequence import Sequence


def sequence(token_ids: list[int], namespace: bytes = b"", sequence_id: int = 0) -> Sequence:
    return Sequence(sequence_id, token_ids, len(token_ids), SamplingParams(max_tokens=1), 0, namespace=namespace)


def compute(blocks: BlockManager, seq: Sequence) -> int:
    """Runs a whole sequence through the cache; returns the tokens that it found."""
    found = blocks.attach_prefix(seq)
    assert blocks.allocate(seq, seq.num_uncomputed_tokens)
    publish(blocks, seq, seq.num_uncomputed_tokens)
    return found


def publish(blocks: BlockManager, seq: Sequence, num_tokens: int) -> None:
    """The next num_tokens tokens are computed."""
    start = seq.num_computed_tokens
    seq.num_computed_tokens += num_tokens
    blocks.publish(seq, start, seq.num_computed_tokens)


def test_a_prefix_is_found_again_and_shared() -> None:
    blocks = BlockManager(16, 4)
    first, second = sequence(list(range(10))), sequence([*range(8), 99, 98])
    assert compute(blocks, first) == 0
    assert compute(blocks, second) == 8
    assert first.block_table[:2] == second.block_table[:2]
    assert blocks.num_free == 16 - 4
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_free == 16
    blocks.check_integrity([])


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(list(range(8))))
    assert compute(blocks, sequence(list(range(8)))) == 4


def test_namespaces_do_not_meet() -> None:
    blocks = BlockManager(16, 4)
    compute(blocks, sequence(list(range(9)), b"digest"))
    assert compute(blocks, sequence(list(range(9)), b"other")) == 0
    assert compute(blocks, sequence(list(range(9)))) == 0
    assert compute(blocks, sequence(list(range(9)), b"digest")) == 8


def test_nothing_is_found_before_it_is_computed() -> None:
    blocks = BlockManager(16, 4)
    first = sequence(list(range(9)))
    blocks.attach_prefix(first)
    assert blocks.allocate(first, 9)
    assert blocks.attach_prefix(sequence(list(range(9)))) == 0
    publish(blocks, first, 5)
    assert blocks.attach_prefix(sequence(list(range(9)))) == 4


def test_a_full_cache_refuses_and_changes_nothing() -> None:
    blocks = BlockManager(2, 4)
    first, second = sequence([1] * 5), sequence([2] * 4)
    compute(blocks, first)
    assert not blocks.allocate(second, 4)
    assert second.block_table == []
    blocks.check_integrity([first, second])


def test_the_longest_unused_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    blocks = BlockManager(4, 2)
    old, new = sequence([1, 2, 3, 4, 5]), sequence([7, 8])
    compute(blocks, old)
    blocks.free(old)
    compute(blocks, new)  # takes the block that held nothing whole
    blocks.free(new)
    other = sequence([9, 9])
    compute(blocks, other)
    assert blocks.attach_prefix(sequence([1, 2, 3, 4, 5])) == 4


@pytest.mark.parametrize("constant", [True, False])
def test_collisions_cost_a_miss_and_never_a_wrong_block(constant: bool) -> None:
    blocks = BlockManager(32, 2, (lambda parent, content: b"same") if constant else None)
    first = sequence([1, 2, 3, 4, 5])
    assert compute(blocks, first) == 0
    assert compute(blocks, sequence([9, 9, 3, 4, 5])) == 0
    assert compute(blocks, sequence([1, 2, 3, 4, 5])) == (2 if constant else 4)
    assert compute(blocks, sequence([1, 2, 3, 4, 5], b"other")) == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=9),
            st.sampled_from([b"", b"a"]),
            st.booleans(),
            st.integers(0, 5),
        ),
        max_size=30,
    ),
    st.sampled_from([None, lambda parent, content: b"", lambda parent, content: content[:1]]),
)
def test_every_block_found_holds_what_was_asked(history: list, hash_block: object) -> None:
    blocks = BlockManager(10, 2, hash_block)  # type: ignore[arg-type]
    contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # block -> namespace and all tokens to its end
    alive: list[Sequence] = []
    for number, (token_ids, namespace, ends, victim) in enumerate(history):
        if ends and alive:
            blocks.free(alive.pop(victim % len(alive)))
        seq = sequence(list(token_ids), namespace, number)
        found = blocks.attach_prefix(seq)
        assert found < len(token_ids)
        for index in range(found // 2):
            assert contents[seq.block_table[index]] == (namespace, tuple(token_ids[: index * 2 + 2]))
        if blocks.allocate(seq, seq.num_uncomputed_tokens):
            publish(blocks, seq, seq.num_uncomputed_tokens)
            for index in range(found // 2, len(token_ids) // 2):
                contents[seq.block_table[index]] = (namespace, tuple(token_ids[: index * 2 + 2]))
            alive.append(seq)
        else:
            blocks.free(seq)
        blocks.check_integrity(alive)
    for seq in alive:
        blocks.free(seq)
    blocks.check_integrity([])
    assert blocks.num_free == 10


def test_adapters_in_a_memory_of_their_own_take_none_of_this_one() -> None:
    """Counted in, they would keep a sequence waiting whose blocks are all free: for ever."""
    assert BlockManager(6, 4).num_free_beside(3) == 6
