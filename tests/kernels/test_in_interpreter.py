"""Runs the kernels' tests in Triton's interpreter; compiles the kernels for sm_90, and launches them, without a GPU.

In processes of their own: Triton reads TRITON_INTERPRET when it is imported, and kernels compile only without it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
KERNELS = [
    "_argmax",
    "_attention_decode",
    "_attention_prefill",
    "_best_of_rows",
    "_draw_rows",
    "_embed",
    "_few_rows_linear",
    "_lora_expand",
    "_lora_rescale",
    "_lora_shrink",
    "_rms_norm",
    "_rotary_store_kv",
    "_rotary_store_kv_lora",
    "_silu_and_mul",
    "_silu_and_mul_lora",
]


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_kernels_in_the_interpreter() -> None:
    result = run("pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", interpret="1")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_steps_with_prompts_in_graphs() -> None:
    result = run(
        "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/worker/test_mixed_graphs.py", interpret="1"
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and " skipped" not in result.stdout


def test_kernels_compile_for_sm_90_without_spills() -> None:
    result = run("tests.kernels.offline", interpret="0")
    assert result.returncode == 0, result.stderr[-8000:]
    usages = json.loads(result.stdout)
    assert usages
    spilled = {name: usage for name, usage in usages.items() if usage["stack"] or usage["local"]}
    assert not spilled


@pytest.mark.parametrize("options", [[], ["--compile"]])
def test_a_launch_gives_the_gpu_what_triton_would_give_it(options: list[str]) -> None:
    result = run("tests.kernels.relaunching", *options, interpret="0")
    assert result.returncode == 0, result.stderr[-8000:]
    report = json.loads(result.stdout)
    assert report["compared"] > 0
    if not options:
        assert sorted(report["kernels"]) == KERNELS
