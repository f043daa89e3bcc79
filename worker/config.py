"""WorkerConfig: everything that can be set, stated once; the command line is made from it.

Flags keep the names that the field knows. An option that would have no effect yet does not exist or is refused.
"""

import argparse
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from protocol.messages import AdapterName
from worker.chunk_layout import ALL_MODULES, CHUNK_RANK

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ConfigError(argparse.ArgumentTypeError):
    """A setting that cannot work; the message names its flag and the limit. argparse shows it as it is."""


class AdapterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An adapter to load at start."""

    lora_name: str
    lora_path: str
    pinned: bool = False

    @classmethod
    def parse(cls, text: str) -> "AdapterSpec":
        """Reads PATH, NAME=PATH or JSON. Raises ConfigError."""
        if text.lstrip().startswith("{"):
            try:
                return msgspec.json.decode(text, type=cls)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"--lora-paths {text}: {error}") from None
        name, separator, path = text.partition("=")
        if separator:
            return cls(name, path)
        is_hub_id = text.count("/") == 1 and text[0].isalnum()
        return cls(text if is_hub_id else Path(text).name, text)


def parse_weight(text: str) -> tuple[str, float]:
    """Reads NAME=W. Raises ConfigError."""
    name, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not name or not 0.01 <= value <= 100:
        raise ConfigError(f"--adapter-weights: {text!r} is not NAME=W with a weight of 0.01 to 100")
    return name, value


def default_endpoint() -> str:
    """A socket in a directory of this user alone."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    directory = (
        Path(runtime_dir) / "polylora" if runtime_dir else Path(tempfile.gettempdir(), f"polylora-{os.getuid()}")
    )
    return f"ipc://{directory}/worker.sock"


def _setting(default: Any, help_: str, **option: Any) -> Any:
    """A field with what argparse must know; `default_text` says a default that depends on other settings."""
    return field(default=default, metadata={"help": help_, **option})


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Of one worker process. Raises ConfigError for values that cannot work together."""

    model_path: str = _setting(DEFAULT_MODEL, "directory or hub id of the base model")
    served_model_name: tuple[str, ...] = _setting(
        (), "names that the base model answers to", nargs="+", default_text="the hub id, or the directory's name"
    )
    enable_lora: bool = _setting(
        False, "serve adapters; --lora-paths and --adapter-resolver imply it", action="store_true"
    )
    lora_paths: tuple[AdapterSpec, ...] = _setting(
        (),
        'adapters to load at start, each PATH, NAME=PATH or {"lora_name": …, "lora_path": …, "pinned": …}',
        flags=("--lora-paths", "--lora-modules"),
        nargs="+",
        action="extend",
        type=AdapterSpec.parse,
    )
    max_loras_per_batch: int = _setting(8, "distinct adapters in one step, the base model not counted")
    max_loaded_loras: int | None = _setting(
        None,
        "adapters kept in host memory, of which they take no more than 0.4 of what is free at the start; beyond it"
        " those never used leave, then the least recently used, and are read again from disk when needed",
        type=int,
        default_text="four times --max-loras-per-batch, and all of --lora-paths",
    )
    num_lora_chunks: int | None = _setting(
        None,
        "the most of the device's memory that adapters take, in chunks of rank 16; an adapter of rank r takes r/16 of"
        " them, rounded up, DoRA one more, and embed_tokens with lm_head as many as their own rank. Idle adapters give"
        " way to KV",
        type=int,
        default_text="all that one longest context of KV leaves; the memory is planned with four for each of"
        " --max-loras-per-batch",
    )
    lora_backend: str = _setting(
        "auto",
        "what computes LoRA and the ops around it: kernels in Triton, which need a GPU, or their twins in torch, which"
        " are slow there; auto is triton on a GPU",
        choices=("auto", "torch", "triton"),
    )
    max_lora_rank: int | None = _setting(
        None,
        "largest rank that is accepted",
        type=int,
        default_text="what --num-lora-chunks holds, and on a GPU at most 256",
    )
    lora_target_modules: tuple[str, ...] = _setting(
        ("all",), f"modules that adapters may change: all, or some of {', '.join(ALL_MODULES)}", nargs="+"
    )
    lora_eviction_policy: str = _setting(
        "lru", "which idle adapter leaves the device first: least recently used or first in", choices=("lru", "fifo")
    )
    lora_drain_wait_threshold: float = _setting(
        1.0,
        "seconds from its arrival that a request may be overtaken if it waits for a place among the step's adapters",
    )
    schedule_policy: str = _setting(
        "vtc",
        "who is admitted next: vtc is fair between adapters, the base model being one of them, by virtual token"
        " counters; fcfs is the order of arrival",
        choices=("vtc", "fcfs"),
    )
    adapter_weights: tuple[tuple[str, float], ...] = _setting(
        (),
        "shares under vtc, each NAME=W: twice the weight is twice the tokens while both wait; the base model has a"
        " name too, and a name need not be loaded yet",
        nargs="+",
        action="extend",
        type=parse_weight,
        default_text="1 for each",
    )
    tp_size: int = _setting(1, "devices that share one model; only 1 so far")
    dtype: str = _setting(
        "auto",
        "type of weights and KV; auto is bfloat16 on a GPU and float32 on the CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = _setting(
        "auto", "where the model runs; auto is the GPU if there is one", choices=("auto", "cpu", "cuda")
    )
    max_running_requests: int | None = _setting(
        None, "sequences in one step; others wait", type=int, default_text="256 on a GPU, 32 on the CPU"
    )
    max_queued_requests: int = _setting(2048, "unfinished sequences that one gateway may have; beyond it 429")
    req_waiting_timeout: float = _setting(
        600.0,  # what OpenAI's SDK gives a whole answer: who could still be served in time is never turned away
        "seconds that a request may wait before its prompt is begun; then it is a 429. 0: as long as it takes",
    )
    chunked_prefill_size: int | None = _setting(
        None,
        "prompt tokens in one step; on a GPU half as many beside up to 128 answers, and answers take the place of as"
        " many, up to half. Fewer shorten the wait between the others' tokens",
        type=int,
        default_text="1024 on a GPU, 512 on the CPU",
    )
    cuda_graph_max_bs: int = _setting(
        256,
        "sequences in the largest step of answers alone that is captured as a CUDA graph; of steps with prompts, those"
        " of up to 512 rows are, beside answers 1024. Without a GPU there are none",
    )
    cuda_graph_dora: bool = _setting(
        False,
        "capture steps with DoRA adapters too, which otherwise run without a graph; it makes the start longer",
        action="store_true",
    )
    mem_fraction: float | None = _setting(
        None,
        "share of the memory free after the model is loaded that KV and adapters take together",
        type=float,
        default_text="0.9 on a GPU, 0.5 on the CPU",
    )
    block_size: int | None = _setting(
        None,
        "tokens in a KV block; what is shared between prompts is whole blocks",
        type=int,
        default_text="64 on a GPU, 16 on the CPU",
    )
    num_kv_blocks: int | None = _setting(
        None,
        "the most KV blocks, in place of what --mem-fraction gives. Cached ones give way to adapters",
        type=int,
        default_text="all that adapters leave; the memory is planned with a full context for each of"
        " --max-running-requests on a GPU, 512 tokens for each on the CPU, at least one full context, and no more than"
        " --mem-fraction allows",
    )
    context_length: int | None = _setting(
        None, "longest prompt and answer together, tokens", type=int, default_text="the model's, as far as KV holds it"
    )
    adapter_root: tuple[str, ...] = _setting(
        (), "directory from which adapters may be loaded at run time; repeat it for several", action="append"
    )
    hub_allow: tuple[str, ...] = _setting(
        (),
        "pattern of hub ids (org/*) or of URLs (s3://bucket/*) that may be loaded at run time; repeat it",
        action="append",
    )
    adapter_resolver: str | None = _setting(
        None,
        "directory of adapters that are loaded when a request names one that is not loaded; a name is a place below it",
        type=str,
        default_text="none: such a name is a 404",
    )
    source_timeout: float = _setting(600.0, "seconds that fetching one adapter from the hub or a URL may take")
    endpoint: str = _setting("", "ipc:// address to listen on", default_text="in XDG_RUNTIME_DIR or the temp directory")
    shutdown_grace: float = _setting(20.0, "seconds that running requests get after SIGTERM; a second signal ends them")
    log_level: str = _setting("info", "the least that is logged", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_what_is_not_there_yet(self)
        _check_adapters(self)
        if self.endpoint.startswith("tcp://"):
            raise ConfigError("--endpoint: tcp needs CURVE keys, which this version cannot be given; use ipc://")
        if self.endpoint and not self.endpoint.startswith("ipc:///"):
            raise ConfigError("--endpoint must be ipc:// and an absolute path")

    @property
    def lora_enabled(self) -> bool:
        return self.enable_lora or bool(self.lora_paths) or self.adapter_resolver is not None

    @property
    def loaded_loras(self) -> int:
        """How many adapters host memory keeps."""
        default = max(4 * self.max_loras_per_batch, len(self.lora_paths))
        return default if self.max_loaded_loras is None else self.max_loaded_loras

    @property
    def target_modules(self) -> frozenset[str]:
        return frozenset(ALL_MODULES if self.lora_target_modules == ("all",) else self.lora_target_modules)

    @property
    def listen_on(self) -> str:
        return self.endpoint or default_endpoint()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_numbers(config: WorkerConfig) -> None:
    at_least_one = (
        "max_loras_per_batch max_loaded_loras num_lora_chunks max_lora_rank tp_size max_running_requests"
        " max_queued_requests chunked_prefill_size cuda_graph_max_bs block_size num_kv_blocks context_length"
    )
    for name in at_least_one.split():
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{_flag(name)} must be at least 1, not {value}")
    if config.context_length == 1:
        raise ConfigError("--context-length must be at least 2, a prompt token and one of the answer")
    for name, highest in (
        ("lora_drain_wait_threshold", 3600.0),
        ("shutdown_grace", 3600.0),
        ("source_timeout", 86400.0),
        ("req_waiting_timeout", 86400.0),
    ):
        if not 0 <= getattr(config, name) <= highest:
            raise ConfigError(f"{_flag(name)} must be 0 to {highest:g} seconds")
    if config.mem_fraction is not None and not 0 < config.mem_fraction <= 1:
        raise ConfigError(f"--mem-fraction must be over 0 and at most 1, not {config.mem_fraction}")


def _check_what_is_not_there_yet(config: WorkerConfig) -> None:
    if config.tp_size != 1:
        raise ConfigError("--tp-size: this version runs on one device; only 1 is possible")
    if config.device == "cpu" and config.lora_backend == "triton":
        raise ConfigError("--lora-backend triton needs a GPU; with --device cpu use torch")


def _check_adapters(config: WorkerConfig) -> None:
    if config.loaded_loras < config.max_loras_per_batch:
        raise ConfigError("--max-loaded-loras must be at least --max-loras-per-batch")
    if config.loaded_loras < len(config.lora_paths):
        raise ConfigError(f"--lora-paths has {len(config.lora_paths)} adapters, over --max-loaded-loras")
    limit = config.max_loras_per_batch - 1
    if sum(spec.pinned for spec in config.lora_paths) > limit:
        raise ConfigError(f"--lora-paths: at most --max-loras-per-batch minus one = {limit} adapters may be pinned")
    resolver = [] if config.adapter_resolver is None else [("--adapter-resolver", config.adapter_resolver)]
    for flag, directory in [*(("--adapter-root", root) for root in config.adapter_root), *resolver]:
        if not Path(directory).is_dir():
            raise ConfigError(f"{flag} {directory}: no such directory")
    taken = set(config.served_model_name)
    for spec in config.lora_paths:
        _check_spec(spec, taken)
        taken.add(spec.lora_name)
    unknown = set() if config.lora_target_modules == ("all",) else set(config.lora_target_modules) - set(ALL_MODULES)
    if unknown:
        raise ConfigError(
            f"--lora-target-modules: all alone, or some of {', '.join(ALL_MODULES)}; not {sorted(unknown)}"
        )
    held = (config.num_lora_chunks or config.max_lora_rank or 0) * CHUNK_RANK
    if config.max_lora_rank is not None and held < config.max_lora_rank:
        raise ConfigError(f"--num-lora-chunks holds rank {held}, less than --max-lora-rank {config.max_lora_rank}")


def _check_spec(spec: AdapterSpec, taken: set[str]) -> None:
    try:
        msgspec.convert(spec.lora_name, AdapterName)
    except msgspec.ValidationError:
        raise ConfigError(
            f"--lora-paths: {spec.lora_name!r} is no adapter name: up to 128 letters, digits and ._:/-"
        ) from None
    if spec.lora_name in taken:
        raise ConfigError(f"--lora-paths: the name {spec.lora_name!r} is given twice")
    if not spec.lora_path:
        raise ConfigError(f"--lora-paths: {spec.lora_name!r} has no path")


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field, with its unit, effect and default."""
    for setting in fields(WorkerConfig):
        option: dict[str, Any] = dict(setting.metadata)
        flags = option.pop("flags", (_flag(setting.name),))
        shown = option.pop("default_text", setting.default if setting.default not in ((), "") else "none")
        shown = " ".join(shown) if isinstance(shown, tuple) else shown
        option["help"] = f"{option['help']} (default: {shown})".replace("%", "%%")
        if option.get("action") != "store_true":
            option.setdefault("type", str if isinstance(setting.default, tuple) else type(setting.default))
            if "choices" not in option:
                option["metavar"] = "N" if option["type"] in (int, float) else setting.name.rsplit("_", 1)[-1].upper()
        # Left out means absent, so that the dataclass alone knows the defaults.
        parser.add_argument(*flags, dest=setting.name, default=argparse.SUPPRESS, **option)


def config_from(options: argparse.Namespace) -> WorkerConfig:
    """The config of parsed options. Raises ConfigError."""
    values: dict[str, Any] = {}
    for name, value in vars(options).items():
        values[name] = tuple(value) if isinstance(value, list) else value
    return WorkerConfig(**values)
