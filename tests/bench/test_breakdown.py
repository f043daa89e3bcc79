"""The breakdown of a step: overlapping kernels count once as busy time, and names say the kind."""

import pytest

from tests.bench.breakdown import OTHER, Kernel, breakdown, kernels_of, table


def test_kinds_less_overlap_and_gaps_make_the_step() -> None:
    events = [
        {"cat": "kernel", "name": "nvjet_tst_64x8", "ts": 100.0, "dur": 10.0},
        {"cat": "kernel", "name": "_lora_shrink", "ts": 104.0, "dur": 4.0},  # inside the GEMM
        {"cat": "kernel", "name": "_lora_expand", "ts": 108.0, "dur": 6.0},  # half of it
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 118.0, "dur": 2.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0.0, "dur": 500.0},
        {"ph": "M", "name": "process_name"},
    ]
    metrics = breakdown(kernels_of({"traceEvents": events[::-1]}), num_steps=2)
    found = {name.removeprefix("profiled_").removesuffix("_ms"): value * 2e3 for name, value in metrics.items()}
    expected = {"gemm": 10, "shrink": 4, "expand": 6, "copies": 2, "overlap": 6, "gaps": 4, "step": 20, "other": 0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert metrics["profiled_busy_percent"] == pytest.approx(80)
    assert metrics["kernels_a_step"] == 2
    with pytest.raises(RuntimeError, match="no kernel"):
        breakdown([], 1)


def test_the_table_names_what_takes_most() -> None:
    kernels = [Kernel("a", 0, 1), Kernel("_silu_and_mul", 1, 5), Kernel("a", 6, 2)]
    first, second = table(kernels, num_steps=1).splitlines()
    assert first.split()[0] == "silu" and second.split()[0] == OTHER
    assert "2.0 x     1.50 us" in second


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_attention_decode", "attention"),
        ("_rms_norm", "norms"),
        ("_rotary_store_kv_lora", "rope_kv"),
        ("_silu_and_mul_lora", "silu"),
        ("_argmax", "sampling"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", OTHER),
    ],
)
def test_kernels_are_sorted_by_name(name: str, kind: str) -> None:
    assert Kernel(name, 0, 0).kind == kind
