"""Which sources a caller may name: nothing outside the roots is opened, and nothing is told of it."""

import os
import threading
from pathlib import Path

import pytest

from protocol.errors import ErrorCode
from tests.worker.adapter_files import write_adapter
from worker.adapter_config import AdapterError
from worker.adapter_download import Downloads
from worker.adapter_source import AdapterSources
from worker.adapter_store import AdapterStore

MAX_BYTES = 10 << 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with an adapter a/, beside secrets/ that nobody may reach."""
    write_adapter(tmp_path / "root" / "a")
    write_adapter(tmp_path / "secrets" / "b")
    write_adapter(tmp_path / "root-evil" / "c")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "secrets")
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "missing")
    (tmp_path / "root" / "in").symlink_to(tmp_path / "root" / "a")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "root"


def sources(directory: Path, roots: list[Path], hub_allow: list[str] | None = None) -> AdapterSources:
    return AdapterSources(roots, hub_allow or [], Downloads(directory, 60.0))


def load(root: Path, source: str, hub_allow: list[str] | None = None) -> Path:
    store = AdapterStore(root.parent / "store")
    with sources(root.parent, [root], hub_allow).open(source, trusted=False, max_bytes=MAX_BYTES) as directory:
        return store.get(store.put(directory, MAX_BYTES))


def refusal(root: Path, source: str) -> tuple[ErrorCode, str]:
    with pytest.raises(AdapterError) as refused:
        load(root, source)
    return refused.value.error.code, refused.value.error.message


@pytest.mark.parametrize("source", ["{root}/a", "a", "./a", "in", "{root}/in", "a/../a", "root/a"])
def test_below_a_root_everything_may_be_named(source: str, root: Path) -> None:
    """root/a is found because the working directory is the root's parent, and the path leads into the root."""
    assert (load(root, source.format(root=root)) / "adapter_config.json").is_file()


OUTSIDE = [
    "{root}/../secrets/b",
    "../secrets/b",
    "../secrets/missing",
    "../root-evil/c",
    "{root}-evil/c",
    "secrets/b",
    "out/b",
    "out/missing",
    "{root}/out/b",
    "dangling",
    "/etc",
    "/etc/passwd",
    "/nonexistent",
    "/proc/self/environ",
    "/dev/zero",
    "~root",
    "file:///etc",
    "http://169.254.169.254/latest",
    "https://example.com/a",
    "org/name",
    "org/name\n",
    "../..",
    "..",
    "",
    "a\0b",
    "a\n",
    "\ud800",
    "a" * 5000,
    "/" + "a" * 300,
    "/a" * 2000,
    "..\\secrets",
]


def test_what_is_outside_gets_one_answer_whether_it_exists_or_not(root: Path) -> None:
    answers = {refusal(root, source.format(root=root)) for source in OUTSIDE if source not in ("~root", "..\\secrets")}
    code, message = answers.pop()
    assert not answers and code is ErrorCode.SOURCE_FORBIDDEN
    assert "--adapter-root" in message and "--hub-allow" in message and str(root.parent) not in message


@pytest.mark.parametrize("source", ["missing", "~root", "..\\secrets", "a b c", "{root}/missing", "file:a"])
def test_what_would_be_below_a_root_is_just_not_there(source: str, root: Path) -> None:
    assert refusal(root, source.format(root=root))[0] is ErrorCode.ADAPTER_NOT_FOUND


def test_without_roots_nothing_local_may_be_named(root: Path) -> None:
    for source in (str(root / "a"), "root/a", "/nonexistent"):
        found = sources(root.parent, []).open(source, trusted=False, max_bytes=MAX_BYTES)
        with pytest.raises(AdapterError) as refused, found:
            pass
        assert refused.value.error.code is ErrorCode.SOURCE_FORBIDDEN


def test_the_operator_may_name_anything(root: Path) -> None:
    for source in ("root/a", str(root.parent / "secrets" / "b"), "root/out/b"):
        with sources(root.parent, []).open(source, trusted=True, max_bytes=MAX_BYTES) as found:
            assert "adapter_config.json" in found.file_names()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_leads_out_of_the_root_is_refused(name: str, root: Path) -> None:
    (root / "a" / name).unlink()
    (root / "a" / name).symlink_to(root.parent / "secrets" / "b" / name)
    code, message = refusal(root, "a")
    assert code is ErrorCode.ADAPTER_INVALID and "leads out" in message and "secrets" not in message


def test_a_link_that_stays_below_the_root_is_followed(root: Path) -> None:
    """The hub's cache is made of such links."""
    (root / "a" / "adapter_model.safetensors").rename(root / "blob")
    (root / "a" / "adapter_model.safetensors").symlink_to("../blob")
    assert load(root, "a").is_dir()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_fifo_neither_blocks_nor_is_read(name: str, root: Path) -> None:
    (root / "a" / name).unlink()
    os.mkfifo(root / "a" / name)
    done: list[tuple[ErrorCode, str]] = []
    thread = threading.Thread(target=lambda: done.append(refusal(root, "a")), daemon=True)
    thread.start()
    thread.join(5)
    assert done == [(ErrorCode.ADAPTER_INVALID, f"{name} is not a regular file")]


def test_a_device_is_not_read(root: Path) -> None:
    (root / "a" / "adapter_model.safetensors").unlink()
    (root / "a" / "adapter_model.safetensors").symlink_to("/dev/zero")
    assert refusal(root, "a")[0] is ErrorCode.ADAPTER_INVALID


# ------------------------------------------------------------------------------------------------------- the resolver


def test_the_resolver_finds_names_below_its_directory_and_nothing_else(root: Path) -> None:
    (root / ".hidden").mkdir()
    write_adapter(root / "team" / "b")
    resolver = AdapterSources([], [], Downloads(root.parent, 60.0), root)
    assert resolver.find_name("a").path == (root / "a").resolve()
    assert resolver.find_name("team/b").path == (root / "team" / "b").resolve()
    names = [
        "team",
        "..",
        "../secrets/b",
        "a/../../secrets/b",
        "team/../a",
        "out/b",
        "dangling",
        "missing",
        "a/",
        "/a",
        ".hidden",
    ]
    names += [
        "",
        ".",
        "a/.",
        "team//b",
        "a\n",
        "a\0",
        "..\\secrets",
        "a" * 300,
        "/".join("a" * 9),
        str(root / "a"),
        "~",
    ]
    names += ["a/adapter_config.json", "org/name@main", "file:///etc", "s3://bucket/a", "a:b", "~", ".hidden"]
    for name in names:
        with pytest.raises(AdapterError) as refused:
            resolver.find_name(name)
        assert refused.value.error.code is ErrorCode.ADAPTER_NOT_FOUND, name
    with pytest.raises(AdapterError):
        sources(root.parent, [root]).find_name("a")
