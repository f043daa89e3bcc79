"""Boot: from a WorkerConfig to a worker that serves. The one place where everything is put together."""

import gc
import logging
import math
import os
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from protocol.messages import ModelCard
from worker.adapter_cache import AdapterCache
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.adapter_service import AdapterService
from worker.background import Background
from worker.block_manager import BlockManager
from worker.chunk_layout import ChunkLayout
from worker.config import ConfigError, WorkerConfig
from worker.device import Target, find_target
from worker.device_memory import DeviceMemory
from worker.engine import Engine
from worker.fair_queue import BASE_CLIENT
from worker.grammar import GrammarCompiler
from worker.grammar_service import GrammarService
from worker.host_arena import HostArena, pin_memory
from worker.kv_cache import KVCache
from worker.mailbox import Message, Outbox, Stop
from worker.memory import MIB, MemoryPlan, MemoryShortage, plan_memory
from worker.model_config import ModelConfig, ModelError
from worker.model_files import TOKENIZER_FILE, fingerprint, read_tokenizer_files
from worker.model_runner import ModelRunner
from worker.model_source import ModelNotFound, default_cache_dir, resolve_model
from worker.private_store import PrivateStore
from worker.scheduler import Scheduler
from worker.server import Server
from worker.socket_file import EndpointError
from worker.start_up import StartUp
from worker.step_pipeline import Runner
from worker.weights import LoadingModel

log = logging.getLogger(__name__)

NUM_LOAD_THREADS = 4  # for adapter commands, which may wait for a download, and for --lora-paths
# For adapters that requests wait for, and for removing copies, which takes its time. A read and its checksum are 30 ms
# of a core for 84 MB, without the interpreter's lock: many that come at once shall not queue where there are cores.
NUM_RELOAD_THREADS = min(16, max(4, (os.cpu_count() or 1) // 2))

MAX_GPU_CHUNKS = 16  # of one adapter on a GPU, rank 256, where --max-lora-rank does not say otherwise

Inbox = queue.SimpleQueue[Message]


class BootError(Exception):
    """The worker cannot start; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base model, on a GPU perhaps still on its way there, and the sizes planned around it."""

    directory: Path
    loading: LoadingModel
    config: ModelConfig
    target: Target
    plan: MemoryPlan
    host_arena: HostArena
    card: ModelCard


class Worker:
    """A worker process: the engine on the thread that calls `run`, the server and the loaders on their own."""

    def __init__(self, config: WorkerConfig, start_s: float | None = None) -> None:
        """Loads the model and the adapters of --lora-paths. Raises BootError.

        start_s: time.monotonic() when the process began, if that was before.
        """
        start_up = StartUp(time.monotonic() if start_s is None else start_s)
        start_up.done("imports")
        try:
            base = _load_base(config)
            self._store = PrivateStore(default_cache_dir())
        except (ConfigError, ModelNotFound, ModelError, MemoryShortage, OSError) as error:
            raise BootError(str(error)) from None
        self._inbox: Inbox = queue.SimpleQueue()
        outbox = Outbox()
        memory = DeviceMemory.of(base.plan, base.config, base.target)
        self._loader = _make_loader(config, base, self._store.directory)
        adapters = _make_adapters(config, base, memory, self._loader, self._inbox, outbox)
        self._server = Server(
            config.listen_on,
            os.urandom(16),
            base.card,
            read_tokenizer_files(base.directory),
            self._inbox,
            credits=config.max_queued_requests,
        )
        start_up.done("model")
        try:
            self._engine = _make_engine(config, base, memory, adapters, self._inbox, outbox, self._server, start_up)
            _load_adapters(config, adapters)
            self._loader.work_apart(start=config.lora_enabled and base.target.device.type == "cuda")
            start_up.done("adapters")
            self._server.post(outbox.take())  # the server learns of these adapters as of any later one
            self._server.start(self._engine.status, adapters.listing.page)
        except (BootError, EndpointError, ModelError) as error:
            base.loading.close()
            self._server.stop()
            self._loader.close()
            self._store.remove()
            raise BootError(str(error)) from None
        log.info("start-up: %s", start_up)
        log.info("ready: %s on %s", ", ".join(base.card.names), config.listen_on)

    def run(self) -> None:
        """Serves until `stop`."""
        gc.collect()
        gc.freeze()  # what is here now stays; the collector need not walk it again
        try:
            self._engine.run()
        finally:
            self._server.stop()
            self._loader.close()
            self._store.remove()

    def stop(self, grace_s: float) -> None:
        """Ends `run` when the running sequences are done, at the latest after grace_s. From any thread or signal."""
        self._inbox.put(Stop(grace_s))


def _load_base(config: WorkerConfig) -> Base:
    target = find_target(config)
    directory = resolve_model(config.model_path)
    loading = LoadingModel(directory, target.dtype, target.device, _Progress(), target.ops)
    model_config = loading.config
    try:
        if not target.uses_triton:  # where there are kernels to compile, weights come beside that
            loading.finish()
        plan = _plan(config, model_config, target)
    except BaseException:
        loading.close()
        raise
    card = ModelCard(
        names=list(config.served_model_name or [_default_name(config.model_path)]),
        digest=fingerprint(directory),
        created=int(time.time()),
        vocab_size=model_config.vocab_size,
        max_model_len=plan.max_model_len,
        eos_token_ids=list(model_config.eos_token_ids),
        prompt_logprobs=True,
        grammars=(directory / TOKENIZER_FILE).exists(),
        lora_enabled=config.lora_enabled,
        adapter_resolver=config.adapter_resolver is not None,
    )
    return Base(directory, loading, model_config, target, plan, _host_arena(config, model_config, target), card)


def _plan(config: WorkerConfig, model: ModelConfig, target: Target) -> MemoryPlan:
    """The sizes of the arena, said in the log as the operator thinks of them."""
    available, block_size, dtype = target.available_bytes(), target.block_size, target.dtype
    block_bytes = KVCache.block_bytes(block_size, model.num_layers, model.num_kv_heads, model.head_dim, dtype)
    chunk_bytes = model.chunk_layout().chunk_size * dtype.itemsize
    plan = plan_memory(
        config,
        max_positions=model.max_position_embeddings,
        block_size=block_size,
        block_bytes=block_bytes,
        chunk_bytes=chunk_bytes,
        available_bytes=available,
        mem_fraction=target.mem_fraction,
        max_running_requests=target.max_running_requests,
        takes_all=target.device.type == "cuda",
    )
    page_bytes = plan.blocks_per_page * block_bytes
    log.info(
        "arena: %d MiB in %d pages, %d MiB were free; room for %d tokens of KV (%d blocks) or %d adapters of rank 16",
        plan.num_pages * page_bytes // MIB,
        plan.num_pages,
        available // MIB,
        plan.max_blocks * block_size,
        plan.max_blocks,
        plan.max_chunks,
    )
    if plan.max_chunks:
        log.info(
            "a page of %.1f MiB is %d tokens of KV or a chunk of rank 16, of which it leaves %.1f %% empty",
            page_bytes / MIB,
            plan.blocks_per_page * block_size,
            100 - 100 * chunk_bytes / page_bytes,
        )
    log.info("longest context: %d tokens, the model's own is %d", plan.max_model_len, model.max_position_embeddings)
    return plan


def _host_arena(config: WorkerConfig, model: ModelConfig, target: Target) -> HostArena:
    """Host memory of adapters; on a GPU it is pinned, beginning now, beside the weights."""
    arena = HostArena(model.chunk_layout(), target.dtype, pin=pin_memory if target.device.type == "cuda" else None)
    if config.lora_enabled:
        arena.keep_ahead(config.loaded_loras)
    return arena


def _make_loader(config: WorkerConfig, base: Base, store_dir: Path) -> AdapterLoader:
    limits = AdapterLimits(
        max_chunks=_max_chunks(config, base),
        max_lora_rank=config.max_lora_rank,
        target_modules=config.target_modules,
    )
    target = base.target
    return AdapterLoader(
        base.config,
        target.dtype,
        limits,
        store_dir,
        [Path(root) for root in config.adapter_root],
        config.hub_allow,
        arena=base.host_arena,
        resolver=None if config.adapter_resolver is None else Path(config.adapter_resolver),
        source_timeout_s=config.source_timeout,
        model_dir=base.directory,
        num_packers=max(1, min(NUM_LOAD_THREADS, (os.cpu_count() or 1) // 4)),  # steps want the other cores
    )


def _make_adapters(
    config: WorkerConfig, base: Base, memory: DeviceMemory, loader: AdapterLoader, inbox: Inbox, outbox: Outbox
) -> AdapterService:
    return AdapterService(
        AdapterCache(
            num_chunks=base.plan.max_chunks,
            max_per_batch=config.max_loras_per_batch,
            max_loaded=config.loaded_loras,
            max_host_chunks=loader.max_host_chunks,
            policy=config.lora_eviction_policy,
            arena=memory.arena,
        ),
        memory.pool,
        loader,
        outbox,
        Background("adapter-load", NUM_LOAD_THREADS, inbox),
        Background("adapter-reload", NUM_RELOAD_THREADS, inbox),
        base_names=frozenset(base.card.names),
        enabled=config.lora_enabled,
        resolves=config.adapter_resolver is not None,
        chunk_bytes=base.config.chunk_layout().chunk_size * base.target.dtype.itemsize,
        max_mix_chunks=_max_chunks(config, base),
    )


def _make_engine(
    config: WorkerConfig,
    base: Base,
    memory: DeviceMemory,
    adapters: AdapterService,
    inbox: Inbox,
    outbox: Outbox,
    server: Server,
    start_up: StartUp,
) -> Engine:
    blocks = BlockManager(base.plan.max_blocks, base.target.block_size, arena=memory.arena)
    scheduler = Scheduler(
        blocks,
        adapters,
        max_running=base.target.max_running_requests,
        max_prefill_tokens=base.target.chunked_prefill_size,
        max_adapters=config.max_loras_per_batch,
        max_overtake_s=config.lora_drain_wait_threshold,
        max_waiting_s=config.req_waiting_timeout or math.inf,
        is_fair=config.schedule_policy == "vtc",
        weights={BASE_CLIENT if name in base.card.names else name: w for name, w in config.adapter_weights},
        prefill_budget=base.target.prefill_budget,
    )
    return Engine(
        base.card,
        _make_runner(config, base, memory, start_up),
        scheduler,
        blocks,
        adapters,
        inbox,
        outbox,
        server.post,
        max_loras_per_batch=config.max_loras_per_batch,
        runs_ahead=base.target.device.type == "cuda",
        grammars=_make_grammars(base, inbox),
    )


def _make_grammars(base: Base, inbox: Inbox) -> GrammarService | None:
    if not base.card.grammars:
        return None
    eos = tuple(base.card.eos_token_ids)
    compiler = GrammarCompiler(base.directory / TOKENIZER_FILE, base.card.vocab_size, eos)
    return GrammarService(compiler.compile, Background("grammar", 1, inbox))


def _make_runner(config: WorkerConfig, base: Base, memory: DeviceMemory, start_up: StartUp) -> Runner:
    model, target, decoder = base.config, base.target, base.loading.decoder
    kv_cache, pool = memory.kv_cache, memory.pool if config.lora_enabled else None
    if not target.uses_triton:
        return ModelRunner(decoder, model, kv_cache, pool, max_rows=target.max_running_requests)
    # Imported here, so that a CPU server never loads Triton.
    from kernels.gpu import launch
    from worker.decode_graphs import DecodeGraphs
    from worker.last_tokens import LastTokens
    from worker.mixed_graphs import MixedGraphs
    from worker.triton_runner import TritonRunner

    max_chunks = _max_chunks(config, base)
    with launch.compiling():
        shallow = TritonRunner(
            decoder.shallow(), model, kv_cache, pool, max_chunks=max_chunks, max_rows=target.max_running_requests
        )
        shallow.warm_up(target.chunked_prefill_size)
    start_up.done("kernels")
    base.loading.finish()
    base.host_arena.wait_until_ahead()
    start_up.done("weights")
    last_tokens = LastTokens(model.vocab_size, target.max_running_requests, target.device)
    lengths = {"max_chunks": max_chunks, "max_model_len": base.plan.max_model_len}
    graphs = DecodeGraphs(
        decoder,
        model,
        kv_cache,
        pool,
        last_tokens,
        max_rows=min(config.cuda_graph_max_bs, target.max_running_requests),
        with_magnitudes=config.cuda_graph_dora,
        **lengths,
    )
    mixed = MixedGraphs(
        decoder,
        model,
        kv_cache,
        pool,
        last_tokens,
        graphs.memory,
        max_rows=target.chunked_prefill_size,
        max_sequences=target.max_running_requests,
        **lengths,
    )
    start_up.done("graphs")
    runner = TritonRunner(decoder, model, kv_cache, pool, max_chunks=max_chunks, graphs=graphs, mixed=mixed)
    runner.warm_up(target.chunked_prefill_size)
    start_up.done("prompts")
    return runner


def _max_chunks(config: WorkerConfig, base: Base) -> int:
    """Of one adapter or mix. The kernels' buffers are laid out for it, so a large pool alone does not raise it."""
    most = max(1, base.plan.max_chunks)
    if config.max_lora_rank is not None:
        return min(most, ChunkLayout.num_chunks(config.max_lora_rank))
    return min(most, MAX_GPU_CHUNKS) if base.target.uses_triton else most


def _load_adapters(config: WorkerConfig, adapters: AdapterService) -> None:
    """Loads the operator's own adapters, read several at once, or says which cannot be."""
    with ThreadPoolExecutor(NUM_LOAD_THREADS) as executor:
        contents = [executor.submit(adapters.read, spec.lora_path) for spec in config.lora_paths]
        for spec, content in zip(config.lora_paths, contents, strict=True):
            error = adapters.load_now(spec.lora_name, spec.lora_path, spec.pinned, content.result)
            if error is not None:
                executor.shutdown(wait=False, cancel_futures=True)
                raise BootError(f"--lora-paths {spec.lora_name}={spec.lora_path}: {error.message}")
            log.info("adapter %s loaded from %s", spec.lora_name, spec.lora_path)


def _default_name(model_path: str) -> str:
    """The served name of a model: a hub id as it is, a directory by its last part."""
    path = Path(model_path).expanduser()
    return path.resolve().name if path.is_dir() else model_path


class _Progress:
    """Says how far the weights are read, each tenth once."""

    def __init__(self) -> None:
        self._tenths = 0

    def __call__(self, num_read: int, num_total: int) -> None:
        tenths = 10 * num_read // max(1, num_total)
        if tenths > self._tenths:
            self._tenths = tenths
            log.info("weights: %d %% of %d MiB", 10 * tenths, num_total // MIB)
