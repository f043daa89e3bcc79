"""Which sources a caller may name: nothing outside the roots is opened, and nothing is told of it."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from protocol.errors import ErrorCode
from tests.worker.adapter_files import write_adapter
from worker import adapter_source
from worker.adapter_config import AdapterError
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


def load(root: Path, source: str, hub_allow: list[str] | None = None) -> Path:
    directory = AdapterSources([root], hub_allow or []).find(source, trusted=False, max_bytes=MAX_BYTES)
    store = AdapterStore(root.parent / "store")
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
        with pytest.raises(AdapterError) as refused:
            AdapterSources([], []).find(source, trusted=False, max_bytes=MAX_BYTES)
        assert refused.value.error.code is ErrorCode.SOURCE_FORBIDDEN


def test_the_operator_may_name_anything(root: Path) -> None:
    for source in ("root/a", str(root.parent / "secrets" / "b"), "root/out/b"):
        found = AdapterSources([], []).find(source, trusted=True, max_bytes=MAX_BYTES)
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


# ------------------------------------------------------------------------------------------------------------ the hub


class FakeHub:
    """Stands for the hub's client: one repository, org/good."""

    def __init__(self, directory: Path, extra: list[str] | None = None, size: int = 100) -> None:
        self.asked: list[str] = []
        self._directory = directory
        self._names = ["adapter_config.json", "adapter_model.safetensors", "README.md", *(extra or [])]
        self._size = size

    def model_info(self, repo: str, **options: Any) -> SimpleNamespace:
        self.asked.append(repo)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=self._size) for name in self._names])

    def download(self, repo: str, **options: Any) -> str:
        return str(self._directory)


def use(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(adapter_source, "HfApi", lambda: hub)
    monkeypatch.setattr(adapter_source, "snapshot_download", hub.download)
    return hub


def test_the_hub_is_asked_for_allowed_ids_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(FakeHub(root / "a"), monkeypatch)
    assert load(root, "org/good", ["org/*"]).is_dir()
    assert AdapterSources([], []).find("any/thing", trusted=True, max_bytes=MAX_BYTES).path == (root / "a").resolve()
    for source in ("evil/good", "org/../evil", "org/good/more", "Org/good", "xorg/good"):
        with pytest.raises(AdapterError) as refused:
            load(root, source, ["org/*"])
        assert refused.value.error.code in (ErrorCode.SOURCE_FORBIDDEN, ErrorCode.ADAPTER_NOT_FOUND)
    assert hub.asked == ["org/good", "any/thing"]


@pytest.mark.parametrize(
    ("hub", "reason"), [({"extra": ["modeling.py"]}, "Python code"), ({"size": 1 << 40}, "are larger than")]
)
def test_a_repository_is_refused_before_it_is_downloaded(
    hub: dict[str, Any], reason: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use(FakeHub(root / "a", **hub), monkeypatch)
    monkeypatch.setattr(fake, "download", None)
    with pytest.raises(AdapterError, match=reason):
        load(root, "org/good", ["org/*"])


def test_a_silent_hub_is_an_error_that_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(adapter_source, "HfApi", lambda: SimpleNamespace(model_info=fail))
    monkeypatch.setattr(adapter_source, "snapshot_download", fail)
    with pytest.raises(AdapterError, match="hub does not answer") as refused:
        load(root, "org/good", ["org/*"])
    assert refused.value.error.code is ErrorCode.ADAPTER_NOT_FOUND
