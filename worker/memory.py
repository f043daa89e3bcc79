"""How much memory KV cache and adapter pool take: sizes that are asked for, or fit, or a clear refusal."""

from dataclasses import dataclass
from pathlib import Path

from worker.chunk_layout import ChunkLayout
from worker.config import WorkerConfig

TOKENS_A_SEQUENCE = 512  # KV planned for each running sequence, as memory allows
CHUNKS_AN_ADAPTER = 4  # pool planned for each adapter of a batch, as memory allows: rank 64
MAX_POOL_SHARE = 0.5  # of the budget, when the pool's size is not asked for
MIB = 1 << 20


class MemoryShortage(Exception):
    """What was asked for does not fit; the message names the flag and the limit."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the two pools, and the longest context that the KV holds."""

    num_blocks: int
    num_chunks: int
    max_model_len: int


def plan_memory(
    config: WorkerConfig,
    *,
    max_positions: int,
    block_size: int,
    block_bytes: int,
    chunk_bytes: int,
    available_bytes: int,
    mem_fraction: float,
    max_running_requests: int,
    takes_all: bool = False,
) -> MemoryPlan:
    """Divides the memory that is left. max_positions: the model's own longest context. Raises MemoryShortage.

    mem_fraction and max_running_requests are config's, or their defaults on this device.
    takes_all: KV gets what is left of --mem-fraction, up to a full context for each of --max-running-requests.
    """
    wanted_len = config.context_length or max_positions
    if wanted_len > max_positions:
        raise MemoryShortage(f"--context-length {wanted_len} is over the model's {max_positions}")
    budget = int(available_bytes * mem_fraction)
    num_chunks = _num_chunks(config, budget // chunk_bytes)
    num_blocks = config.num_kv_blocks
    if num_blocks is None:
        each = wanted_len if takes_all else TOKENS_A_SEQUENCE
        num_tokens = max(max_running_requests * each, wanted_len)
        num_blocks = min(-(-num_tokens // block_size), (budget - num_chunks * chunk_bytes) // block_bytes)
    num_tokens = num_blocks * block_size
    num_bytes = num_blocks * block_bytes + num_chunks * chunk_bytes
    if num_bytes > available_bytes:
        raise MemoryShortage(
            f"--num-kv-blocks and --num-lora-chunks take {num_bytes // MIB} MiB; {available_bytes // MIB} MiB are free"
        )
    if num_tokens < 2 or (config.context_length or 0) > num_tokens:
        raise MemoryShortage(
            f"there is KV for {max(0, num_tokens)} tokens, less than one context of {config.context_length or 2}; raise"
            " --mem-fraction or --num-kv-blocks, or lower --context-length or --num-lora-chunks"
        )
    return MemoryPlan(num_blocks, num_chunks, min(wanted_len, num_tokens))


def _num_chunks(config: WorkerConfig, fitting: int) -> int:
    """Chunks of the adapter pool. fitting: how many the whole budget holds."""
    if not config.lora_enabled:
        return 0
    if config.num_lora_chunks is not None:
        return config.num_lora_chunks
    needed = ChunkLayout.num_chunks(config.max_lora_rank or 1)
    num_chunks = min(max(config.max_loras_per_batch * CHUNKS_AN_ADAPTER, needed), int(fitting * MAX_POOL_SHARE))
    if num_chunks < needed:
        raise MemoryShortage(f"memory holds {num_chunks} adapter chunks, and --max-lora-rank needs {needed}")
    return num_chunks


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, and no more than its control group's."""
    meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available  # no control group, or one of the older kind
    return available if limit == "max" else max(0, min(available, int(limit) - used))
