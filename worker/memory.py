"""How large the arena of KV and adapters is, and what each may take of it: as asked for, or as fits, or a refusal."""

from dataclasses import dataclass
from pathlib import Path

from worker.chunk_layout import ChunkLayout
from worker.config import WorkerConfig

TOKENS_A_SEQUENCE = 512  # KV planned for each running sequence, as memory allows
CHUNKS_AN_ADAPTER = 4  # pages planned for each adapter of a batch, as memory allows: rank 64
MAX_ADAPTER_SHARE = 0.5  # of the budget, when the number of chunks is not asked for
MIB = 1 << 20


class MemoryShortage(Exception):
    """What was asked for does not fit; the message names the flag and the limit."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The arena's size, the most of it that KV and adapters take, and the longest context that is sure to find KV.

    A page is one chunk, rounded up to whole blocks. Without adapters it is one block.
    """

    num_pages: int
    blocks_per_page: int
    max_blocks: int
    max_chunks: int
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
    blocks_per_page = -(-chunk_bytes // block_bytes) if config.lora_enabled else 1
    page_bytes, page_size = blocks_per_page * block_bytes, blocks_per_page * block_size
    budget = int(available_bytes * mem_fraction) // page_bytes
    num_chunks = _num_chunks(config, budget)
    if config.num_kv_blocks is not None:
        num_kv_pages = -(-config.num_kv_blocks // blocks_per_page)
    else:
        each = wanted_len if takes_all else TOKENS_A_SEQUENCE
        num_tokens = max(max_running_requests * each, wanted_len)
        num_kv_pages = max(0, min(-(-num_tokens // page_size), budget - num_chunks))
    num_pages = num_kv_pages + num_chunks
    if num_pages * page_bytes > available_bytes:
        raise MemoryShortage(
            f"--num-kv-blocks and --num-lora-chunks take {num_pages * page_bytes // MIB} MiB;"
            f" {available_bytes // MIB} MiB are free"
        )
    max_blocks = config.num_kv_blocks or num_pages * blocks_per_page
    num_tokens = min(max_blocks, num_kv_pages * blocks_per_page) * block_size
    if num_tokens < 2 or (config.context_length or 0) > num_tokens:
        raise MemoryShortage(
            f"there is KV for {num_tokens} tokens, less than one context of {config.context_length or 2}; raise"
            " --mem-fraction or --num-kv-blocks, or lower --context-length or --num-lora-chunks"
        )
    max_model_len = min(wanted_len, num_tokens)
    max_chunks = num_chunks
    if config.lora_enabled and config.num_lora_chunks is None:  # then all but what one context needs
        max_chunks = num_pages - -(-max_model_len // page_size)
    return MemoryPlan(num_pages, blocks_per_page, max_blocks, max_chunks, max_model_len)


def _num_chunks(config: WorkerConfig, fitting: int) -> int:
    """Pages planned for adapters beside those for KV. fitting: how many the whole budget holds."""
    if not config.lora_enabled:
        return 0
    if config.num_lora_chunks is not None:
        return config.num_lora_chunks
    needed = ChunkLayout.num_chunks(config.max_lora_rank or 1)
    num_chunks = min(max(config.max_loras_per_batch * CHUNKS_AN_ADAPTER, needed), int(fitting * MAX_ADAPTER_SHARE))
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
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # of files, which give way
        used = int((group / "memory.current").read_text()) - cached
    except (OSError, ValueError, KeyError):
        return available  # no control group, or one of the older kind
    return available if limit == "max" else max(0, min(available, int(limit) - used))
