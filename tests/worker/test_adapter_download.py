"""Adapters from a hub that is slow, lies, breaks off or is gone, and from whatever fsspec reads."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from protocol.errors import ErrorCode
from tests.worker.adapter_files import write_adapter
from worker import adapter_download
from worker.adapter_config import AdapterError
from worker.adapter_download import Downloads
from worker.adapter_fetch import fetch_url
from worker.adapter_source import AdapterSources
from worker.adapter_store import AdapterStore

MAX_BYTES = 10 << 20
COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """The hub's routes for one repository, org/good, at one commit that "main" and "v1" name."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.sizes: dict[str, int] = {}  # what it says of them, where that is a lie
        self.asked: list[str] = []
        self.stuck = threading.Event()  # a download has begun that will not end
        self.hangs = False
        self.num_cuts = 0  # downloads yet to be broken off in their middle
        self.ranges: list[str] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        if found := re.fullmatch(r"/api/models/org/good(?:/revision/(.*))?", path):
            if found[1] not in (None, "main", "v1", COMMIT):
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
                return
            siblings = [{"rfilename": name, "size": hub.sizes.get(name, len(data))} for name, data in hub.files.items()]
            info = {"id": "org/good", "modelId": "org/good", "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(info).encode(), {}, body)
        elif path.startswith("/api/models/org/good/tree/"):
            tree = [
                {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                for name, data in hub.files.items()
            ]
            self._answer(200, json.dumps(tree).encode(), {}, body)
        elif (found := re.fullmatch(r"/org/good/resolve/[^/]*/(.*)", path)) and found[1] in hub.files:
            data = hub.files[found[1]]
            if hub.hangs and body and found[1].endswith("safetensors"):
                hub.stuck.set()
                hub.release.wait(30)
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if body and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
                hub.ranges.append(asked[0])
                span = f"bytes {asked[1]}-{len(data) - 1}/{len(data)}"
                self._answer(206, data[int(asked[1]) :], {**headers, "Content-Range": span}, body)
                return
            cut = body and hub.num_cuts > 0 and found[1].endswith("safetensors")
            hub.num_cuts -= cut
            self._answer(200, data, headers, body, len(data) // 2 if cut else None)
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def _answer(self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
            self.close_connection = cut is not None


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    source = write_adapter(tmp_path / "made")
    return {path.name: path.read_bytes() for path in source.iterdir()} | {"README.md": b"x" * 1000}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    hub.release.set()
    hub.shutdown()
    hub.server_close()


def load(
    tmp_path: Path,
    source: str,
    allow: tuple[str, ...] = ("org/*",),
    timeout_s: float = 60.0,
    max_bytes: int = MAX_BYTES,
    cancelled: threading.Event | None = None,
) -> Path:
    store = AdapterStore(tmp_path / "store")
    sources = AdapterSources([], allow, Downloads(store.directory, timeout_s))
    with sources.open(source, trusted=False, max_bytes=max_bytes, cancelled=cancelled) as directory:
        return store.get(store.put(directory, max_bytes))


def refusal(tmp_path: Path, source: str, **options: Any) -> tuple[ErrorCode, str]:
    with pytest.raises(AdapterError) as refused:
        load(tmp_path, source, **options)
    return refused.value.error.code, refused.value.error.message


def test_a_repository_comes_at_its_revision_and_from_the_cache_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    got = load(tmp_path, "org/good@v1")
    assert {path.name for path in got.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert any(path.endswith("/revision/v1") for path in hub.asked)
    assert not any("README" in path for path in hub.asked)
    hub.shutdown()
    hub.server_close()
    assert load(tmp_path, "org/good@v1") == got
    code, message = refusal(tmp_path, "org/good@v2")
    assert code is ErrorCode.SOURCE_UNAVAILABLE and "does not answer" in message


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    """The library writes pieces of 10 MiB, and goes on behind the last whole one."""
    data = bytes(range(256)) * (24 << 12)
    hub.files["adapter_model.safetensors"] = data
    hub.num_cuts = 1
    got = load(tmp_path, "org/good", max_bytes=64 << 20)
    assert (got / "adapter_model.safetensors").read_bytes() == data
    assert hub.num_cuts == 0 and hub.ranges == [f"bytes={10 << 20}-"]


def test_what_the_hub_has_not_or_may_not_be_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert refusal(tmp_path, "org/other")[0] is ErrorCode.ADAPTER_NOT_FOUND
    code, message = refusal(tmp_path, "org/good@nowhere")
    assert code is ErrorCode.ADAPTER_NOT_FOUND and "revision" in message
    before = len(hub.asked)
    for source in ("evil/good", "org/../evil", "org/good/more", "Org/good", "xorg/good", "org/good@../x", "org/good@"):
        assert refusal(tmp_path, source)[0] in (ErrorCode.SOURCE_FORBIDDEN, ErrorCode.ADAPTER_NOT_FOUND)
    assert len(hub.asked) == before


def test_a_repository_is_refused_before_it_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.sizes["adapter_model.safetensors"] = 1 << 40
    code, message = refusal(tmp_path, "org/good")
    assert code is ErrorCode.ADAPTER_LIMIT and "larger than" in message
    hub.sizes.clear()
    hub.files["modeling.py"] = b"raise SystemExit"
    assert "Python code" in refusal(tmp_path, "org/good")[1]
    assert not any("/resolve/" in path for path in hub.asked)


def test_a_hub_that_lies_about_sizes_is_cut_off(hub: Hub, tmp_path: Path) -> None:
    hub.files["adapter_model.safetensors"] = b"x" * (4 << 20)
    hub.sizes["adapter_model.safetensors"] = 100
    assert refusal(tmp_path, "org/good", max_bytes=100_000)[0] in (
        ErrorCode.SOURCE_UNAVAILABLE,
        ErrorCode.ADAPTER_LIMIT,
    )
    assert not any(path.stat().st_size > (2 << 20) for path in tmp_path.joinpath("hf").rglob("*") if path.is_file())


def test_a_download_is_bounded_in_time(hub: Hub, tmp_path: Path) -> None:
    hub.hangs = True
    before = time.monotonic()
    code, message = refusal(tmp_path, "org/good", timeout_s=2.0)
    assert code is ErrorCode.SOURCE_UNAVAILABLE and "--source-timeout" in message
    assert time.monotonic() - before < 15


def test_a_download_is_cancelled(hub: Hub, tmp_path: Path) -> None:
    hub.hangs = True
    cancelled = threading.Event()
    threading.Thread(target=lambda: (hub.stuck.wait(30), cancelled.set()), daemon=True).start()
    assert refusal(tmp_path, "org/good", cancelled=cancelled)[0] is ErrorCode.LOAD_CANCELLED
    assert hub.stuck.is_set()
    hub.hangs = False
    assert load(tmp_path, "org/good").is_dir()


WORKER = """
import sys
from pathlib import Path
from worker.adapter_download import Downloads
Downloads(Path(sys.argv[1]), 60.0).hub("org/good", None, 1 << 20, None)
"""


def test_a_worker_that_is_killed_takes_its_downloads_along(hub: Hub, tmp_path: Path) -> None:
    hub.hangs = True
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)])
    try:
        assert hub.stuck.wait(30)
        (child,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    finally:
        worker.kill()
        worker.wait(10)
    deadline = time.monotonic() + 10
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_dies_is_an_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_download.sys, "executable", "/bin/false")
    assert refusal(tmp_path, "org/good")[0] is ErrorCode.SOURCE_UNAVAILABLE


# ------------------------------------------------------------------------------------------------------------ fsspec


@pytest.fixture
def bucket(files: dict[str, bytes]) -> Iterator[Any]:
    """An object store in memory, with an adapter at memory://bucket/a."""
    memory = fsspec.filesystem("memory")
    for name, data in files.items():
        memory.pipe(f"/bucket/a/{name}", data)
    yield memory
    memory.rm("/bucket", recursive=True)


def fetch_refusal(url: str, target: Path, max_bytes: int = MAX_BYTES) -> tuple[ErrorCode, str]:
    with pytest.raises(AdapterError) as refused:
        fetch_url(url, target, max_bytes)
    return refused.value.error.code, refused.value.error.message


def test_an_object_store_is_copied(bucket: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    got = fetch_url("memory://bucket/a", tmp_path / "got", MAX_BYTES)
    assert {path.name: path.read_bytes() for path in got.iterdir()} == {
        name: data for name, data in files.items() if name.startswith("adapter")
    }


def test_what_an_object_store_has_not_or_has_too_much_of(bucket: Any, tmp_path: Path) -> None:
    target = tmp_path / "got"
    assert fetch_refusal("memory://bucket/missing", target)[0] is ErrorCode.ADAPTER_NOT_FOUND
    assert fetch_refusal("memory://bucket/a", target, 1000) == (
        ErrorCode.ADAPTER_LIMIT,
        "the adapter's files are larger than the 1000 bytes that this worker takes",
    )
    assert fetch_refusal("nothing://bucket/a", target)[0] is ErrorCode.SOURCE_UNAVAILABLE
    bucket.pipe("/bucket/a/evil.py", b"raise SystemExit")
    assert "Python code" in fetch_refusal("memory://bucket/a", target)[1]
    bucket.rm("/bucket/a/evil.py")
    bucket.rm("/bucket/a/adapter_config.json")
    assert "no adapter_config.json" in fetch_refusal("memory://bucket/a", target)[1]


def test_a_copy_goes_on_where_it_broke_off_unless_the_file_has_changed(
    bucket: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "got"
    target.mkdir()
    name = "adapter_model.safetensors"
    key = bucket.ukey(f"/bucket/a/{name}")[:32]
    begun = b"~" * 100 + files[name][100:500]  # not what is there, so that it shows
    (target / f"{name}.{key}.part").write_bytes(begun)
    fetch_url("memory://bucket/a", target, MAX_BYTES)
    assert (target / name).read_bytes() == begun + files[name][500:]
    (target / f"{name}.{'0' * 32}.part").write_bytes(begun)
    fetch_url("memory://bucket/a", target, MAX_BYTES)
    assert (target / name).read_bytes() == files[name]


ALLOWED = "file://{root}/bucket/*"


def test_urls_are_fetched_by_a_process_and_leave_nothing_behind(tmp_path: Path) -> None:
    write_adapter(tmp_path / "bucket" / "a")
    allow = (ALLOWED.format(root=tmp_path),)
    got = load(tmp_path, f"file://{tmp_path}/bucket/a", allow)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [got.name]
    assert refusal(tmp_path, f"file://{tmp_path}/bucket/b", allow=allow)[0] is ErrorCode.ADAPTER_NOT_FOUND
    assert refusal(tmp_path, "s3://bucket/a", allow=("s3://bucket/*",))[0] is ErrorCode.SOURCE_UNAVAILABLE


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/secrets/a",
        "file://{root}/bucket/../secrets/a",
        "file://{root}/bucket/./a",
        "file://{root}/bucket//a",
        "file://{root}/bucket/%2e%2e/secrets/a",
        "file://{root}/bucket/a?x=1",
        "file://{root}/bucket/a#x",
        "simplecache::file://{root}/bucket/a",
        "file://{root}/bucket/a::file://{root}/secrets/a",
        "local://{root}/bucket/a",
        "FILE://{root}/bucket/a",
        "s3://bucket/a",
        "http://169.254.169.254/latest",
        "file://{root}/bucket/a\n",
        "file://{root}\\bucket/a",
    ],
)
def test_a_url_is_what_a_pattern_says_or_forbidden(url: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "bucket" / "a")
    write_adapter(tmp_path / "secrets" / "a")
    allow = (ALLOWED.format(root=tmp_path), "*", "*/*", "org/*")  # patterns of hub ids open no URL
    assert refusal(tmp_path, url.format(root=tmp_path), allow=allow)[0] is ErrorCode.SOURCE_FORBIDDEN


def test_the_same_url_twice_at_once_comes_twice(tmp_path: Path) -> None:
    write_adapter(tmp_path / "bucket" / "a")
    store = AdapterStore(tmp_path / "store")
    sources = AdapterSources([], [ALLOWED.format(root=tmp_path)], Downloads(store.directory, 60.0))

    def take(_: int) -> str:
        with sources.open(f"file://{tmp_path}/bucket/a", trusted=False, max_bytes=MAX_BYTES) as directory:
            return store.put(directory, MAX_BYTES)

    with ThreadPoolExecutor(3) as pool:
        (digest,) = set(pool.map(take, range(3)))
    assert [path.name for path in store.directory.iterdir()] == [digest]
