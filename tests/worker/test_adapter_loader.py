"""The loader at the door: sound adapters in every form come in, everything else is refused with its reason."""

import array
import errno
import fcntl
import json
import os
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from protocol.errors import ErrorCode
from tests.worker.adapter_files import LAYOUT, TinyModel, config, delta, tensors, write_adapter
from worker.adapter_config import AdapterError
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits, AdapterPacker
from worker.adapter_source import SourceDirectory
from worker.adapter_weights import PackedAdapter
from worker.packer_process import PackerProcess, PackerProcesses

WEIGHTS = "adapter_model.safetensors"
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def loader(tmp_path: Path) -> AdapterLoader:
    return new_loader(tmp_path)


def new_loader(tmp_path: Path, dtype: torch.dtype = torch.float32, **limits: Any) -> AdapterLoader:
    return AdapterLoader(TinyModel(), dtype, AdapterLimits(**{"max_chunks": 4, **limits}), tmp_path / "store")


def refusal(loader: AdapterLoader, source: Path, code: ErrorCode = ErrorCode.ADAPTER_INVALID) -> str:
    """The message of the refusal; it must not show where things lie."""
    with pytest.raises(AdapterError) as refused:
        loader.load(str(source), trusted=True)
    assert refused.value.error.code is code, refused.value.error
    assert "/" not in refused.value.error.message
    return refused.value.error.message


def copied(packed: PackedAdapter) -> list[torch.Tensor]:
    """Its chunks, in memory of their own: the adapter's goes to others when it is dropped."""
    return [chunk.clone() for chunk in packed.chunks]


def same(packed: PackedAdapter, chunks: Sequence[torch.Tensor]) -> bool:
    """Whether it has these chunks."""
    return len(packed.chunks) == len(chunks) and all(map(torch.equal, packed.chunks, chunks))


# ------------------------------------------------------------------------------------------------------ what is taken


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtypes_become_the_models(stored: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(stored) for name, tensor in tensors().items()}
    source = write_adapter(tmp_path / "a", weights=weights)
    packed = new_loader(tmp_path, torch.bfloat16).load(str(source), trusted=True)
    assert packed.chunks[0].dtype == torch.bfloat16 and packed.scales.dtype == torch.float32
    assert packed.rank == 4 and packed.modules == ("q_proj", "v_proj") and packed.scales[0, 0] == 2.0
    exact = new_loader(tmp_path).load(str(source), trusted=True)
    a, b = weights[NAME].float(), weights[NAME.replace("lora_A", "lora_B")].float()
    torch.testing.assert_close(delta(exact, 0, "q_proj"), 2 * b @ a)


def test_shards_with_an_index(loader: AdapterLoader, tmp_path: Path) -> None:
    weights = tensors()
    whole = loader.load(str(write_adapter(tmp_path / "whole", weights=weights)), trusted=True)
    source = write_adapter(tmp_path / "parts", weights=weights)
    (source / WEIGHTS).unlink()
    shards = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = sorted(weights)
    weight_map = {name: shards[number % 2] for number, name in enumerate(names)}
    for shard in shards:
        save_file({name: weights[name] for name in names if weight_map[name] == shard}, source / shard)
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    packed = loader.load(str(source), trusted=True)
    assert same(packed, whole.chunks) and packed.digest != whole.digest
    weight_map[names[0]] = shards[1]
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "do not hold the same tensors" in refusal(loader, source)
    weight_map[names[0]] = "../parts.safetensors"
    (source / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(AdapterError, match="which the adapter has not"):
        loader.load(str(source), trusted=True)


def test_same_content_has_the_same_digest_wherever_it_lies(loader: AdapterLoader, tmp_path: Path) -> None:
    weights = tensors()
    first = loader.load(str(write_adapter(tmp_path / "a", weights=weights)), trusted=True)
    again = loader.load(str(write_adapter(tmp_path / "b", weights=weights)), trusted=True)
    other = loader.load(str(write_adapter(tmp_path / "c", config(lora_alpha=9), weights)), trusted=True)
    assert first.digest == again.digest != other.digest


def test_threads_may_load_the_same_at_once(loader: AdapterLoader, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    loaded: list[PackedAdapter] = []
    threads = [threading.Thread(target=lambda: loaded.append(loader.load(str(source), trusted=True))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8 and len({packed.digest for packed in loaded}) == 1
    assert [path.name for path in (tmp_path / "store").iterdir()] == [loaded[0].digest]


# --------------------------------------------------------------------------------------- A1-A5: files, config, tensors


def cut(source: Path, size: int) -> None:
    path = source / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda source: (source / "adapter_config.json").unlink(), "no adapter_config.json"),
    "config not JSON": (lambda source: (source / "adapter_config.json").write_text("{"), "not a JSON object"),
    "config empty": (lambda source: (source / "adapter_config.json").write_text(""), "not a JSON object"),
    "no tensors": (lambda source: (source / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "tensors empty": (lambda source: cut(source, 0), "not a safetensors file"),
    "tensors cut in the header": (lambda source: cut(source, 100), "cut short"),
    "tensors cut in the data": (lambda source: cut(source, -10), "not a safetensors file"),
    "garbage": (lambda source: (source / WEIGHTS).write_bytes(b"\x93NUMPY" * 999), "not a safetensors file"),
    "pickle renamed": (lambda source: (source / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n."), "not a safetensors"),
    "only .bin": (lambda source: (source / WEIGHTS).rename(source / "adapter_model.bin"), "never opened"),
    "brings code": (lambda source: (source / "modeling.py").write_text("raise SystemExit"), "Python code"),
    "a directory": (lambda source: [(source / WEIGHTS).unlink(), (source / WEIGHTS).mkdir()], "not a regular file"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_broken_files_are_refused(fault: str, loader: AdapterLoader, tmp_path: Path) -> None:
    spoil, reason = FILE_FAULTS[fault]
    source = write_adapter(tmp_path / "a")
    spoil(source)
    assert reason in refusal(loader, source)
    assert list((tmp_path / "store").glob(".copy-*")) == []


def test_what_is_not_there_is_not_found(loader: AdapterLoader, tmp_path: Path) -> None:
    refusal(loader, tmp_path / "nothing", ErrorCode.ADAPTER_NOT_FOUND)


def changed(**tensors_by_name: Any) -> dict[str, torch.Tensor]:
    return tensors() | tensors_by_name


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors().items() if name not in names}


CONTENT_FAULTS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "rank of the config": (config(r=5), tensors(), "has the shape [4, 24], but rank and model ask for [5, 24]"),
    "another base": (config(), changed(**{NAME: torch.randn(4, 25)}), "shape [4, 25]"),
    "not a matrix": (config(), changed(**{NAME: torch.randn(4)}), "shape [4]"),
    "no A": (config(), without(NAME), "tensor is missing"),
    "no B": (config(), without(NAME.replace("lora_A", "lora_B")), "tensor is missing"),
    "a targeted module is missing": (config(target_modules=["q_proj", "v_proj", "o_proj"]), tensors(), "missing"),
    "a module is not targeted": (config(target_modules=["q_proj"]), tensors(), "targets in no module"),
    "an extra tensor": (config(), changed(extra=torch.zeros(1)), "targets in no module of this model: extra"),
    "no tensor at all": (config(), {}, "tensor is missing"),
    "a layer too many": (config(), changed(**{NAME.replace("0", "2"): torch.randn(4, 24)}), "targets in no module"),
    "no name fits": (config(), {f"x.{name}": t for name, t in tensors().items()}, "targets in no module"),
    "lm_head": (config(target_modules=["q_proj", "lm_head"]), tensors(), "lm_head, which is not supported"),
    "magnitudes": (config(), changed(**{NAME[:-13] + "lora_magnitude_vector": torch.ones(32)}), "targets in no module"),
    "integers": (config(), changed(**{NAME: torch.ones(4, 24, dtype=torch.int32)}), "is of type I32"),
    "doubles": (config(), changed(**{NAME: torch.ones(4, 24, dtype=torch.float64)}), "is of type F64"),
    "NaN": (config(), changed(**{NAME: torch.full((4, 24), float("nan"))}), "NaN or infinity"),
    "infinity": (config(), changed(**{NAME: torch.full((4, 24), float("-inf"))}), "NaN or infinity"),
    "scale too small": (config(lora_alpha=1e-60), tensors(), "lora_alpha"),
    "scale too large": (config(lora_alpha=1e60), tensors(), "lora_alpha"),
}


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_wrong_content_is_refused(fault: str, loader: AdapterLoader, tmp_path: Path) -> None:
    keys, weights, reason = CONTENT_FAULTS[fault]
    assert reason in refusal(loader, write_adapter(tmp_path / "a", keys, weights))


def test_values_too_large_for_the_models_dtype_are_refused(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a", weights=changed(**{NAME: torch.full((4, 24), 1e6)}))
    assert new_loader(tmp_path).load(str(source), trusted=True).rank == 4
    assert "too large for the model's dtype" in refusal(new_loader(tmp_path, torch.float16), source)


def test_limits_are_named(tmp_path: Path) -> None:
    def refused(rank: int, **limits: Any) -> str:
        source = write_adapter(tmp_path / f"r{rank}", config(r=rank), tensors(rank))
        return refusal(new_loader(tmp_path, **limits), source, ErrorCode.ADAPTER_LIMIT)

    assert "rank 17 is above the limit of 16 (--max-lora-rank)" in refused(17, max_lora_rank=16)
    assert "rank 65 is above the limit of 64" in refused(65)
    assert "v_proj is not among --lora-target-modules (q_proj)" in refused(4, target_modules=frozenset({"q_proj"}))
    source = write_adapter(tmp_path / "pattern", config(rank_pattern={"q_proj": 40}), tensors())
    assert "rank 40" in refusal(new_loader(tmp_path, max_lora_rank=32), source, ErrorCode.ADAPTER_LIMIT)


def test_files_too_large_are_refused_unread(loader: AdapterLoader, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    with (source / "adapter_config.json").open("r+b") as file:
        file.truncate(50 << 20)
    assert "adapter_config.json is larger" in refusal(loader, source, ErrorCode.ADAPTER_LIMIT)
    source = write_adapter(tmp_path / "b")
    with (source / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "adapter_model.safetensors is larger" in refusal(loader, source, ErrorCode.ADAPTER_LIMIT)


def test_headers_and_tensor_counts_are_bounded(tmp_path: Path) -> None:
    loader = new_loader(tmp_path, max_chunks=200)
    source = write_adapter(tmp_path / "a", weights={})
    header = json.dumps({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(21_000)})
    (source / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert "more than 20000 tensors" in refusal(loader, source, ErrorCode.ADAPTER_LIMIT)
    (source / WEIGHTS).write_bytes(struct.pack("<Q", 5 << 20) + b" " * (5 << 20))
    assert "the header" in refusal(loader, source, ErrorCode.ADAPTER_LIMIT)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I8", "F8_E4M3", "BOOL", "X", 3]),
        "shape": st.lists(st.sampled_from([0, 1, 4, 24, -1, 2**31, 2**63, 2**64, 1.5]), max_size=3),
        "data_offsets": st.lists(st.sampled_from([0, 1, 384, 10**6, -1, 2**64]), max_size=3),
    },
)
HEADER = st.dictionaries(st.sampled_from([NAME, "x", "", "__metadata__"]), ENTRY).map(json.dumps) | st.sampled_from(
    ["", "{}", "[]", "null", "{" * 5000, '{"a":' * 5000, '{"x":{},"x":{}}', '{"x":1e999}', '"\ud800"']
)


@given(
    header=HEADER,
    size=st.none() | st.sampled_from([0, 1, 7, 2**31, 2**63, 2**64 - 1, 100 << 20]),
    data=st.binary(max_size=400),
)
@settings(max_examples=150, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_malformed_safetensors_are_refused(header: str, size: int | None, data: bytes, tmp_path: Path) -> None:
    encoded = header.encode("utf-8", "surrogatepass")
    source = write_adapter(tmp_path / "a")
    (source / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + data)
    with pytest.raises(AdapterError) as refused:
        new_loader(tmp_path).load(str(source), trusted=True)
    assert refused.value.error.code in (ErrorCode.ADAPTER_INVALID, ErrorCode.ADAPTER_LIMIT)


# ------------------------------------------------------------------------------------------------- A7: changed sources


def test_a_source_that_changes_after_the_load_changes_nothing(loader: AdapterLoader, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    packed = loader.load(str(source), trusted=True)
    digest, chunks, scales = packed.digest, copied(packed), packed.scales.clone()
    del packed  # nothing is in memory any more: it is read again
    cut(source, 20)
    again = loader.reload(digest)
    assert same(again, chunks) and torch.equal(again.scales, scales) and again.digest == digest
    del again
    for path in source.iterdir():
        path.unlink()
    assert same(loader.reload(digest), chunks)
    assert [chunk.shape for chunk in chunks] == [(LAYOUT.chunk_size,)]


# ---------------------------------------------------------------------------------------------- packed, and kept packed


def lose(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("name", ["packed.bin", "packed.json"])
@pytest.mark.parametrize("damage", [lose, flip, cut_off])
def test_a_damaged_packed_file_is_made_again(
    damage: Callable[[Path], None], name: str, loader: AdapterLoader, tmp_path: Path
) -> None:
    packed = loader.load(str(write_adapter(tmp_path / "a")), trusted=True)
    digest, chunks, scales, stored_bytes = packed.digest, copied(packed), packed.scales.clone(), packed.stored_bytes
    del packed
    damage(tmp_path / "store" / digest / name)
    again = loader.reload(digest)
    assert same(again, chunks) and torch.equal(again.scales, scales)
    assert again.stored_bytes == stored_bytes


def test_a_copy_damaged_and_not_packed_is_not_served(loader: AdapterLoader, tmp_path: Path) -> None:
    digest = loader.load(str(write_adapter(tmp_path / "a")), trusted=True).digest
    for name in (WEIGHTS, "packed.bin"):
        flip(tmp_path / "store" / digest / name)
    with pytest.raises(AdapterError, match="damaged"):
        loader.reload(digest)


def test_the_same_content_is_packed_once_and_in_memory_once(
    loader: AdapterLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tensors()
    first = loader.load(str(write_adapter(tmp_path / "a", weights=weights)), trusted=True)
    with monkeypatch.context() as patch:
        patch.delattr(AdapterPacker, "pack")
        assert loader.load(str(write_adapter(tmp_path / "b", weights=weights)), trusted=True) is first
        digest, chunks = first.digest, copied(first)
        del first
        assert same(loader.load(str(tmp_path / "b"), trusted=True), chunks)
    for _ in range(3):
        loader.release(digest)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_disk_that_is_full_before_all_is_packed_leaves_nothing_behind(
    loader: AdapterLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, real, sizes = write_adapter(tmp_path / "a"), os.write, []

    def fill(handle: int, data: memoryview) -> int:
        sizes.append(len(data))
        if len(sizes) > 2:  # config and tensors are copied; the chunks come next
            raise OSError(errno.ENOSPC, "full")
        return real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        assert "store is full" in refusal(loader, source, ErrorCode.STORE_FULL)
    assert len(sizes) == 3 and list((tmp_path / "store").iterdir()) == []
    assert loader.load(str(source), trusted=True).rank == 4


# ------------------------------------------------------------------------------------------------ packed by a process


@pytest.fixture
def apart(loader: AdapterLoader) -> Iterator[AdapterLoader]:
    loader.work_apart(start=True)
    yield loader
    loader.close()


def test_a_process_packs_the_same_and_refuses_the_same(apart: AdapterLoader, tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a", config(r=20), tensors(20))
    here = AdapterLoader(TinyModel(), torch.float32, AdapterLimits(max_chunks=4), tmp_path / "other")
    expected, packed = here.load(str(source), trusted=True), apart.load(str(source), trusted=True)
    assert same(packed, expected.chunks) and torch.equal(packed.scales, expected.scales)
    assert (packed.digest, packed.rank, packed.modules) == (expected.digest, expected.rank, expected.modules)
    keys, weights, reason = CONTENT_FAULTS["NaN"]
    assert reason in refusal(apart, write_adapter(tmp_path / "b", keys, weights))
    assert "rank 65 is above" in refusal(
        apart, write_adapter(tmp_path / "c", config(r=65), tensors(65)), ErrorCode.ADAPTER_LIMIT
    )
    apart.release(packed.digest)
    assert list((tmp_path / "store").iterdir()) == []


def test_a_process_that_dies_fails_one_load(apart: AdapterLoader, tmp_path: Path) -> None:
    source = str(write_adapter(tmp_path / "a"))
    first = packers()
    os.kill(first[0], signal.SIGSTOP)  # so that it is killed in the middle of the load
    with open(f"/proc/{first[0]}/fd/0", "rb") as orders, ThreadPoolExecutor(1) as executor:
        unread = num_unread(orders)
        load = executor.submit(apart.load, source, trusted=True)
        while num_unread(orders) == unread:
            time.sleep(0.01)
        os.kill(first[0], signal.SIGKILL)
        orders.close()
        with pytest.raises(AdapterError, match="ended in the middle of this one") as failed:
            load.result()
    assert failed.value.error.code is ErrorCode.INTERNAL
    assert apart.load(source, trusted=True).rank == 4
    assert len(first) == len(packers()) == 1 and first != packers()


def test_a_process_that_hangs_fails_one_load(tmp_path: Path) -> None:
    """And what it had copied by then goes with it."""
    source, store = SourceDirectory(write_adapter(tmp_path / "a"), tmp_path), tmp_path / "store"
    store.mkdir()
    packer = PackerProcess(LAYOUT, torch.float32, AdapterLimits(max_chunks=4), store)
    try:
        first = packer.take_in(source)
        hung = packers()[0]
        os.kill(hung, signal.SIGSTOP)
        (store / f".copy-{hung}-12345678").mkdir()
        packer.limit_s = 0.2
        with pytest.raises(AdapterError, match=r"not read and packed within 0\.2 s") as failed:
            packer.take_in(source)
        assert failed.value.error.code is ErrorCode.DEADLINE_EXCEEDED
        assert list(store.iterdir()) == [first.path], "what was handed over before is the loader's"
        packer.limit_s = 120
        assert packer.take_in(source).digest == first.digest
        assert packers() != [hung]
    finally:
        packer.close()
    assert not packers()


def test_one_that_hangs_does_not_keep_the_others(tmp_path: Path) -> None:
    sources = [SourceDirectory(write_adapter(tmp_path / name), tmp_path) for name in "abc"]
    store = tmp_path / "store"
    store.mkdir()
    limits = AdapterLimits(max_chunks=4)
    processes = PackerProcesses([PackerProcess(LAYOUT, torch.float32, limits, store) for _ in range(2)])
    try:
        processes.take_in(sources[0])
        (hung,) = packers()
        os.kill(hung, signal.SIGSTOP)
        with open(f"/proc/{hung}/fd/0", "rb") as orders, ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(processes.take_in, sources[1])
            while not num_unread(orders):
                time.sleep(0.01)
            others = {processes.take_in(source).digest for source in (sources[2], sources[0])}
            assert len(others) == 2 and not waiting.done()
            os.kill(hung, signal.SIGCONT)
            assert waiting.result().digest not in others
        assert len(packers()) == 2
    finally:
        processes.close()
    assert not packers()


def num_unread(pipe: BinaryIO) -> int:
    return int(array.array("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


def packers() -> list[int]:
    """The ids of this process's children that pack adapters."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"worker.packer_process" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found
