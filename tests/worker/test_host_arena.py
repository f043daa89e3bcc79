"""Host memory of adapters: a slot is one adapter's at a time, comes back by itself, and is pinned once."""

import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ErrorCode
from tests.worker.adapter_files import LAYOUT, TinyModel, tensors, write_adapter
from tests.worker.recorded_copies import Recorded
from worker.adapter_config import AdapterError
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import PackedAdapter
from worker.chunk_layout import MODULES
from worker.host_arena import LEFT_BYTES, HostArena, HostRoom, pin_memory
from worker.packed_file import read_packed, write_packed

CHUNK_BYTES = LAYOUT.chunk_size * 4
PLENTY = 1 << 40
Pin = Callable[[torch.Tensor], None]


def new_arena(pin: Pin | None = None, free: int = PLENTY) -> HostArena:
    """A slab has 64 chunks. free: bytes that the machine has, fewer with each slab that is taken."""
    arenas: list[HostArena] = []

    def available() -> int:
        return free - sum(arena.num_chunks * CHUNK_BYTES for arena in arenas)

    arenas.append(HostArena(LAYOUT, torch.float32, pin, available))
    return arenas[0]


def packed_in(room: HostRoom, seed: int) -> PackedAdapter:
    """An adapter of random content."""
    draw = torch.Generator().manual_seed(seed)
    for chunk in room.chunks:
        chunk.normal_(generator=draw)
    room.scales.normal_(generator=draw)
    return PackedAdapter(16 * len(room.chunks), MODULES, room.chunks, room.scales, f"{seed}", room=room)


@given(history=st.lists(st.integers(-8, 70), max_size=40))
def test_every_history_of_takes_and_drops_keeps_the_books(history: list[int]) -> None:
    """Above 0: takes so many; else drops one that is there."""
    arena, rooms = new_arena(), list[HostRoom]()
    for number in history:
        if number > 0:
            rooms.append(arena.take(number))
        elif rooms:
            del rooms[number % len(rooms)]
        arena.check_integrity()
        addresses = [chunk.data_ptr() for room in rooms for chunk in room.chunks]
        assert len(set(addresses)) == len(addresses) == arena.num_taken
        assert len({room.scales.data_ptr() for room in rooms}) == len(rooms)
    rooms.clear()
    assert arena.num_taken == 0
    arena.check_integrity()


def test_threads_never_share_a_slot_and_later_rounds_take_nothing_from_the_system() -> None:
    pinned: list[torch.Tensor] = []
    arena = new_arena(pinned.append)
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        rng, rooms = random.Random(seed), list[HostRoom]()
        for turn in range(150):
            if len(rooms) < 3 or rng.random() < 0.5:
                rooms.append(arena.take(rng.randint(1, 5)))
                for chunk in rooms[-1].chunks:
                    chunk.fill_(seed)
                rooms[-1].scales.fill_(seed)
            if len(rooms) > 6:
                room = rooms.pop(rng.randrange(len(rooms)))
                assert all(bool((chunk == seed).all()) for chunk in (*room.chunks, room.scales)), turn
        barrier.wait(30)  # all hold what they hold

    most = 8 * 7 * 5
    first = [arena.take(5) for _ in range(most // 5)]
    num_slabs = len(pinned)
    assert num_slabs == -(-most // 64) and arena.num_chunks == 64 * num_slabs
    first.clear()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(pinned) == num_slabs, "what was taken once is used again"
    assert arena.num_taken == 0
    arena.check_integrity()


def test_without_memory_a_take_fails_and_one_that_fits_does_not() -> None:
    arena = new_arena(free=LEFT_BYTES + 2 * 64 * CHUNK_BYTES + 10_000)
    rooms = [arena.take(60)]
    with pytest.raises(AdapterError, match="no room for .*--max-loaded-loras") as refused:
        arena.take(200)
    assert refused.value.error.code is ErrorCode.STORE_FULL
    arena.check_integrity()
    rooms.append(arena.take(arena.num_chunks - 60))
    with pytest.raises(AdapterError):
        arena.take(1)
    rooms.pop(0)
    assert len(arena.take(60).chunks) == 60
    assert arena.num_taken == arena.num_chunks - 60


def test_a_slab_that_cannot_be_pinned_serves_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(memory: torch.Tensor) -> None:
        raise OSError(errno.ENOMEM, "limit of locked memory")

    arena = new_arena(refuse)
    packed = packed_in(arena.take(2), 1)
    assert "are not pinned" in caplog.text and "limit of locked memory" in caplog.text
    assert all(bool(chunk.isfinite().all()) for chunk in packed.chunks)


def test_slabs_are_pinned_ahead_as_far_as_memory_allows_and_each_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pinned: list[torch.Tensor] = []
    arena = new_arena(pinned.append, free=4 * 100 * CHUNK_BYTES + LEFT_BYTES)
    arena.wait_until_ahead()
    assert arena.num_chunks == 0, "it has not been told to"
    arena.keep_ahead(100)
    arena.wait_until_ahead()
    assert arena.num_chunks == 128
    assert "pinned now" in caplog.text
    room = arena.take(65)
    wait_until(lambda: arena.num_chunks == 192, "less than a slab is free")
    assert len(pinned) == 3 and arena.num_taken == 65
    ends = sorted((slab.data_ptr(), slab.data_ptr() + slab.nbytes) for slab in pinned)
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))
    starts = {slab.data_ptr(): slab.data_ptr() + slab.nbytes for slab in pinned}
    for part in (*room.chunks, room.scales):
        assert any(a <= part.data_ptr() and part.data_ptr() + part.nbytes <= b for a, b in starts.items())


def test_whoever_waits_for_it_does_not_wait_for_memory_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    arena = new_arena(lambda slab: None, free=LEFT_BYTES + 65 * CHUNK_BYTES)
    arena.keep_ahead(100)
    arena.wait_until_ahead()
    assert arena.num_chunks == 64
    assert "no room for" in caplog.text


def wait_until(is_so: Callable[[], bool], why: str = "") -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, why
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------- reading, copying


def test_what_cannot_be_read_gives_its_room_back(tmp_path: Path) -> None:
    arena = new_arena()
    written = packed_in(new_arena().take(3), 2)
    write_packed(tmp_path, written)
    packed = read_packed(tmp_path, "2", arena)
    assert packed is not None and arena.num_taken == 3 and packed.num_bytes == 3 * CHUNK_BYTES
    assert all(map(torch.equal, packed.chunks, written.chunks)) and torch.equal(packed.scales, written.scales)
    data = bytearray((tmp_path / "packed.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "packed.bin").write_bytes(data)
    assert read_packed(tmp_path, "2", arena) is None
    assert arena.num_taken == 3
    del packed
    assert arena.num_taken == 0
    arena.check_integrity()


def test_a_load_without_host_memory_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    arena = new_arena(free=LEFT_BYTES + 65 * CHUNK_BYTES + 64 * 100)
    loader = AdapterLoader(TinyModel(), torch.float32, AdapterLimits(max_chunks=80), tmp_path / "store", arena=arena)
    small = loader.load(str(write_adapter(tmp_path / "small")), trusted=True)
    assert loader.host_bytes == small.num_bytes == CHUNK_BYTES
    keys = {"peft_type": "LORA", "r": 16 * 70, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    large = write_adapter(tmp_path / "large", keys, tensors(16 * 70))
    with pytest.raises(AdapterError, match="host memory") as refused:
        loader.load(str(large), trusted=True)
    assert refused.value.error.code is ErrorCode.STORE_FULL
    assert [path.name for path in (tmp_path / "store").iterdir()] == [small.digest]
    assert loader.reload(small.digest) is small
    del small
    assert loader.host_bytes == 0


def test_a_copy_in_flight_keeps_what_it_reads() -> None:
    """On a GPU nothing else does: the driver knows nothing of who owns host memory."""
    arena, copies = new_arena(), Recorded()
    pool = AdapterPool(LAYOUT, 4, torch.float32, torch.device("cpu"), copies=copies)
    pool.upload(1, packed_in(arena.take(2), 1), [0, 1])
    pool.upload(2, packed_in(arena.take(1), 2), [2])
    pool.remove(1)  # unloaded meanwhile
    pool.note_done()
    assert arena.num_taken == 3
    copies.events[0].is_done = True
    pool.note_done()
    assert arena.num_taken == 1
    copies.events[1].is_done = True
    assert pool.is_ready(2)
    pool.note_done()
    assert arena.num_taken == 0
    short = packed_in(arena.take(2), 3)
    broken = PackedAdapter(32, MODULES, (short.chunks[0], short.chunks[1][:7]), short.scales, "", room=short.room)
    del short
    pool.remove(2)
    with pytest.raises(RuntimeError):
        pool.upload(3, broken, [2, 3])
    del broken
    pool.note_done()
    assert arena.num_taken == 2, "a part of it may be on its way"
    copies.events[2].is_done = True
    pool.note_done()
    assert arena.num_taken == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_pinned_and_no_copy_reads_what_came_later() -> None:
    arena, device = HostArena(LAYOUT, torch.bfloat16, pin_memory), torch.device("cuda")
    assert all(part.is_pinned() for part in (*arena.take(3).chunks, arena.take(1).scales))
    pool = AdapterPool(LAYOUT, 64, torch.bfloat16, device)
    torch.cuda.synchronize()
    expected: dict[int, PackedAdapter] = {}
    busy = torch.zeros(4096, 4096, device=device)
    for generation in range(1, 33):
        for _ in range(20):
            busy @= busy  # what the copies wait for
        pool.upload(generation, packed_in(arena.take(2), generation), [2 * generation - 2, 2 * generation - 1])
        expected[generation] = packed_in(HostArena(LAYOUT, torch.bfloat16).take(2), generation)
    assert arena.num_taken > 0, "copies are on their way"
    torch.cuda.synchronize()
    for generation, packed in expected.items():
        assert pool.is_ready(generation)
        for chunk_id, chunk in zip(pool.resident(generation).chunk_ids, packed.chunks, strict=True):
            assert torch.equal(pool.chunks[chunk_id].cpu(), chunk)
        assert torch.equal(pool.resident(generation).scales.cpu(), packed.scales)
    pool.note_done()
    assert arena.num_taken == 0
