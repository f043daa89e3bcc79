"""The private store: whole or not at all, and never what a caller can change."""

import errno
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protocol.errors import ErrorCode
from tests.worker.adapter_files import write_adapter
from worker.adapter_config import AdapterError
from worker.adapter_source import SourceDirectory
from worker.adapter_store import AdapterStore

MAX_BYTES = 10 << 20


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> SourceDirectory:
    return SourceDirectory(write_adapter(tmp_path.resolve() / "a"), tmp_path.resolve())


def test_the_store_is_private(store: AdapterStore, source: SourceDirectory) -> None:
    path = store.get(store.put(source, MAX_BYTES))
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not any(file.is_symlink() for file in path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(
    number: int, store: AdapterStore, source: SourceDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, data: memoryview) -> int:
        raise OSError(number, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(AdapterError, match="store is full") as refused:
            store.put(source, MAX_BYTES)
    assert refused.value.error.code is ErrorCode.STORE_FULL
    assert list(store.directory.iterdir()) == []
    assert store.get(store.put(source, MAX_BYTES)).is_dir()


def test_leftovers_of_a_crash_are_ignored_and_old_ones_removed(store: AdapterStore, source: SourceDirectory) -> None:
    young, old = store.directory / ".copy-young", store.directory / ".copy-old"
    for leftover in (young, old):
        leftover.mkdir()
        (leftover / "adapter_config.json").write_text("{")
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    again = AdapterStore(store.directory)
    assert young.exists() and not old.exists()
    digest = again.put(source, MAX_BYTES)
    assert sorted(path.name for path in store.directory.iterdir()) == [".copy-young", digest]


def flip(path: Path) -> None:
    """Damage that leaves size and time as they were."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_copy_is_noticed_and_replaced(store: AdapterStore, source: SourceDirectory) -> None:
    digest = store.put(source, MAX_BYTES)
    (store.directory / digest / "adapter_model.safetensors").write_bytes(b"cut")
    assert store.put(source, MAX_BYTES) == digest
    assert store.get(digest), "the second put has seen it"
    flip(store.directory / digest / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="damaged"):
        store.get(digest)
    assert store.put(source, MAX_BYTES) == digest
    assert sorted(path.name for path in store.get(digest).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(AdapterError, match="gone"):
        store.get("0" * 64)


def test_a_file_that_changes_under_the_reader_is_refused(
    store: AdapterStore, source: SourceDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, weights = os.write, source.path / "adapter_model.safetensors"
    times = weights.stat().st_mtime_ns

    def meddle(handle: int, data: memoryview) -> int:
        nonlocal times
        times += 1
        os.utime(weights, ns=(times, times))
        return real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", meddle)
        with pytest.raises(AdapterError, match="changed while it was read"):
            store.put(source, MAX_BYTES)
    assert list(store.directory.iterdir()) == []


def test_the_limit_is_of_all_files_together(store: AdapterStore, source: SourceDirectory) -> None:
    total = sum(path.stat().st_size for path in source.path.iterdir())
    with pytest.raises(AdapterError, match="larger") as refused:
        store.put(source, total - 1)
    assert refused.value.error.code is ErrorCode.ADAPTER_LIMIT
    assert store.put(source, total)


def test_a_copy_stays_as_long_as_somebody_holds_it(store: AdapterStore, source: SourceDirectory) -> None:
    digest = store.put(source, MAX_BYTES)
    assert store.put(source, MAX_BYTES) == digest
    store.release(digest)
    assert store.get(digest).is_dir()
    store.release(digest)
    assert list(store.directory.iterdir()) == []
    assert store.get(store.put(source, MAX_BYTES)).is_dir()


def test_threads_may_put_and_release_the_same_at_once(store: AdapterStore, source: SourceDirectory) -> None:
    def work(_: int) -> None:
        for _ in range(10):
            digest = store.put(source, MAX_BYTES)
            assert (store.get(digest) / "adapter_config.json").is_file()
            store.release(digest)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert list(store.directory.iterdir()) == []
