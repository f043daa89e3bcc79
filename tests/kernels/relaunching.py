"""Launches whole steps at a stand-in for Triton's driver, each launch our way and Triton's own, and compares the two.

Prints the kernels and the number of comparisons as JSON. See kernels/gpu/variant.py.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels.gpu import launch, sample
from kernels.gpu.rms_norm import rms_norm
from kernels.gpu.silu_and_mul import silu_and_mul
from kernels.gpu.variant import Variant
from protocol.sampling import SamplingParams
from tests.kernels import fake_driver
from worker.adapter_pool import AdapterPool
from worker.adapter_weights import PackedAdapter, Parts
from worker.chunk_layout import MODULES
from worker.kv_cache import KVCache
from worker.layers.ops import triton_ops
from worker.model_config import ModelConfig, Rope
from worker.models.decoder import Decoder
from worker.sequence import ScheduledSequence, Sequence
from worker.triton_runner import TritonRunner

CPU = torch.device("cpu")
BLOCK_SIZE = 16


def config(*, qk_norm: bool, window: int | None) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM", vocab_size=48, hidden_size=64, intermediate_size=80, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5, rope=Rope(10000.0),
        tie_word_embeddings=True, qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=qk_norm, sliding_window=window,
        eos_token_ids=(2,), dtype="bfloat16",
    )  # fmt: skip


class Weights:
    """Tensors of any name, which nobody reads."""

    device = CPU

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __contains__(self, name: str) -> bool:
        return False

    def take(self, name: str, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype)

    def merge(self, names_and_rows: list[tuple[str, int]], *row_shape: int) -> Tensor:
        return self.take("", sum(rows for _, rows in names_and_rows), *row_shape)


class Steps:
    """A small model and three adapters: of one chunk, of two, and of one with magnitudes."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        decoder = Decoder(model, Weights(dtype), triton_ops())
        cache = KVCache(64, BLOCK_SIZE, model.num_layers, model.num_kv_heads, model.head_dim, dtype, CPU)
        layout = model.chunk_layout()
        pool = AdapterPool(layout, 6, dtype, CPU)
        for generation, chunk_ids in ((1, (0,)), (2, (1, 2))):
            chunks = torch.zeros(len(chunk_ids), layout.chunk_size, dtype=dtype)
            scales = torch.ones(model.num_layers, len(MODULES))
            pool.upload(generation, PackedAdapter(16 * len(chunk_ids), MODULES, chunks.unbind(), scales, ""), chunk_ids)
        chunks, scales = torch.zeros(2, layout.chunk_size, dtype=dtype), torch.ones(model.num_layers, len(MODULES))
        pool.upload(
            3, PackedAdapter(16, MODULES, chunks.unbind(), scales, "", kinds=Parts(1, has_magnitudes=True)), (3, 4)
        )
        self.runner = TritonRunner(decoder, model, cache, pool, max_chunks=2)

    def run(self, decodes: list[int], prompts: list[tuple[int, int]]) -> None:
        """decodes: their generations. prompts: generations and tokens."""
        shares = [self._share(i, generation, 20, 1) for i, generation in enumerate(decodes)]
        shares += [self._share(40 + i, generation, tokens, tokens) for i, (generation, tokens) in enumerate(prompts)]
        self.runner.launch(shares)

    def _share(self, index: int, content: int, num_tokens: int, share: int) -> ScheduledSequence:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        blocks = [(index + i) % 64 for i in range(-(-num_tokens // BLOCK_SIZE))]
        computed = num_tokens - share
        tokens = [1] * num_tokens
        return Sequence(
            index, tokens, num_tokens, sampling, 0, content=content, block_table=blocks, num_computed_tokens=computed
        ).share(share)


class Comparison:
    """Stands in for launch.run."""

    def __init__(self) -> None:
        self.num_by_triton = 0
        self.num_compared = 0
        self.kernels: dict[str, int] = {}
        self._varied: set[tuple[Any, ...]] = set()
        run_by_triton = JITFunction.run

        def run(*args: Any, **kwargs: Any) -> Any:
            self.num_by_triton += 1
            return run_by_triton(*args, **kwargs)

        JITFunction.run = run

    def run(self, variant: Variant, grid: tuple[int, ...], *args: Any) -> None:
        """Compare a launch; and, the first time, its like with every argument changed in turn."""
        function, _ = self.compare(variant, grid, args)
        name = variant.kernel.__name__
        self.kernels[name] = self.kernels.get(name, 0) + 1
        kinds = tuple(map(kind, args, variant.kernel.params))
        if (variant, kinds) in self._varied:
            return
        self._varied.add((variant, kinds))
        for i, (value, parameter) in enumerate(zip(args, variant.kernel.params, strict=False)):
            for other in others(value):
                changed = (*args[:i], other, *args[i + 1 :])
                other_function, was_known = self.compare(variant, grid, changed)
                is_same_kind = kind(other, parameter) == kinds[i]
                assert is_same_kind == (other_function == function), (name, parameter.name, value, other)
                assert was_known or not is_same_kind, (name, parameter.name, value, other)

    def compare(self, variant: Variant, grid: tuple[int, ...], args: tuple[Any, ...]) -> tuple[Any, bool]:
        """One launch, twice our way and once Triton's own: its function, and whether the first was a known one."""
        fake_driver.launches.clear()
        before = self.num_by_triton
        variant.start(grid, args)
        was_known = self.num_by_triton == before
        before = self.num_by_triton
        variant.start(grid, args)
        assert self.num_by_triton == before, f"{variant.kernel.__name__} went Triton's way again"
        variant.kernel[grid](*args, **variant.options, **variant.constants)
        assert self.num_by_triton == before + 1
        first, again, expected = fake_driver.launches
        for launched in (first, again):
            assert launched[:4] == expected[:4], (launched[:4], expected[:4])
            assert len(launched.args) == len(expected.args) == len(variant.kernel.params)
            assert all(map(is_same, launched.args, expected.args))
        assert again.hooks == (None, None, None) and not any(hook.calls for hook in expected.hooks[1:])
        self.num_compared += 1
        return again.function, was_known


def is_same(value: Any, other: Any) -> bool:
    """Whether Triton's launcher takes them for the same: it makes an address of a tensor itself."""
    if isinstance(other, Tensor):
        return value is other or (type(value) is int and value == other.data_ptr())
    return type(value) is type(other) and bool(value == other)


def kind(value: Any, parameter: Any) -> tuple[Any, ...]:
    """What of an argument makes another kernel."""
    if isinstance(value, Tensor):
        return (value.dtype, value.data_ptr() % 16 == 0)
    if isinstance(value, int):
        width = 32 if -(2**31) <= value < 2**31 else 64
        return (width,) if parameter.do_not_specialize else (width, value == 1, value % 16 == 0)
    return (type(value),)


def others(value: Any) -> Iterator[Any]:
    """Of the same kind and of every other that it could have."""
    if isinstance(value, Tensor):
        memory = torch.zeros(64, dtype=torch.int64).view(value.dtype)
        assert memory.data_ptr() % 64 == 0
        yield from (memory[16:], memory[1:], memory.view(torch.uint8)[:32].view(torch.float16), None)
    elif isinstance(value, int):
        yield from (0, 1, 3, 16, 48, 50, -16, 2**31 - 1, 2**31, 2**40 + 1)
    elif value is None:
        yield torch.zeros(16)
    else:
        yield from (value + 1, 0.0)


def steps(dtype: torch.dtype, model: ModelConfig) -> None:
    """Decodes, prompts and both, of the base model and with adapters, few rows and many."""
    small = Steps(model, dtype)
    for generations in ([0] * 3, [1], [0, 1, 2, 3, 1, 0], [1, 2] * 17):
        small.run(generations, [])
    for prompts in ([(0, 17)], [(1, 40), (0, 33)], [(2, 300)], [(0, 301)], [(1, 470), (2, 65)]):
        small.run([], prompts)
        small.run([0, 1, 2], prompts)


def sample_rows(vocab_size: int) -> None:
    numbers, integers = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    logits = torch.zeros(4, vocab_size, dtype=torch.bfloat16)
    sample(logits, numbers, integers, numbers, numbers, numbers.double(), integers)


def check_the_rest(driver: fake_driver.Driver, comparison: Comparison) -> None:
    """Another stream; hooks; arguments that nobody knows."""
    kept: list[tuple[Any, ...]] = []
    launch.run = lambda *args: kept.append(args)
    silu_and_mul(torch.zeros(3, 64))
    (variant, grid, *args), told = kept[0], []
    driver.stream += 1
    comparison.compare(variant, grid, tuple(args))
    assert fake_driver.launches[1].stream == driver.stream == fake_driver.STREAM + 1
    for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        hook.add(told.append)
        before = comparison.num_by_triton
        variant.start(grid, tuple(args))
        assert comparison.num_by_triton == before + 1 and fake_driver.launches[-1].hooks[0] is not None
        hook.remove(told.append)
        comparison.compare(variant, grid, tuple(args))
    for wrong in ((*args, 1), args[:-1], (*args[:-1], object())):
        try:
            variant.start(grid, tuple(wrong))
        except TypeError:
            continue
        raise AssertionError(wrong)


def main() -> None:
    compiles = sys.argv[1:] == ["--compile"]
    driver = fake_driver.use(compiles)
    with launch.compiling():
        silu_and_mul(torch.zeros(3, 64))
    assert not fake_driver.launches
    comparison = Comparison()
    if compiles:
        launch.run = lambda variant, grid, *args: functions.append(comparison.compare(variant, grid, args)[0])
        functions: list[int] = []
        for x in (torch.zeros(2, 64), torch.zeros(3, 64), torch.zeros(129)[1:].view(2, 64)):
            rms_norm(x, torch.zeros(64), 1e-5)
        assert functions[0] == functions[1] != functions[2], "what is not aligned has a kernel of its own"
    else:
        launch.run = comparison.run
        steps(torch.bfloat16, config(qk_norm=True, window=None))
        steps(torch.float32, config(qk_norm=False, window=32))
        for vocab_size in (48, 1000):
            sample_rows(vocab_size)
        check_the_rest(driver, comparison)
    json.dump({"kernels": comparison.kernels, "compared": comparison.num_compared}, sys.stdout)


if __name__ == "__main__":
    main()
