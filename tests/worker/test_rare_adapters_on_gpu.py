"""DoRA and LoRA of embed_tokens and lm_head through the Triton runner, mixed with plain adapters, against PEFT.

Needs a GPU, where it runs in float32 with and without CUDA graphs, or Triton's interpreter, where it takes a minute.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.worker.test_rare_adapters import ASKED, NUM_CHUNKS, NUM_OUTPUTS, PROMPT, Answer, check, expected, load_all
from tests.worker.test_rare_adapters import files as files
from tests.worker.test_rare_adapters import pytestmark as filters
from tests.worker.triton_driver import DEVICE, triton_driver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU"),
    *filters,
]
expected = expected  # a fixture
GRAPHS = [(0, False), (20, False), (20, True)] if DEVICE.type == "cuda" else [(0, False)]  # rows, with magnitudes


@contextlib.contextmanager
def waiting_for_the_gpu_is_an_error() -> Iterator[None]:
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", GRAPHS)
def test_all_mixed(
    files: Path, expected: dict[str, tuple[Answer, list[float]]], tmp_path: Path, graphs: tuple[int, bool]
) -> None:
    driver = triton_driver(files / "model", num_chunks=NUM_CHUNKS, graph_rows=graphs[0], with_magnitudes=graphs[1])
    generations = load_all(driver, files, tmp_path / "store")
    rng = random.Random(5)
    rows = [(name, driver.add(PROMPT, generation, ASKED)) for name, generation in [*generations.items()] * 2]
    while unfinished := [s for _, s in rows if s.num_tokens - s.num_prompt_tokens < NUM_OUTPUTS]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        step = [(s, rng.randint(1, s.num_uncomputed_tokens)) for s in chosen]
        with waiting_for_the_gpu_is_an_error():
            driver.step_ahead(step)
    driver.collect()
    for name, sequence in rows:
        check(driver, sequence, expected[name])


def test_plain_and_base_rows_are_the_same_to_the_bit_whatever_is_beside_them(files: Path, tmp_path: Path) -> None:
    for graph_rows, with_magnitudes in GRAPHS:
        driver = triton_driver(
            files / "model", num_chunks=NUM_CHUNKS, graph_rows=graph_rows, with_magnitudes=with_magnitudes
        )
        generations = load_all(driver, files, tmp_path / "store")
        answers = []
        for mates in (
            ["base", "base", "base"],
            ["dora", "edges alone", "head"],
            ["embeddings", "dora of some", "dora"],
        ):
            watched = [driver.add([5, 6], 0, ASKED), driver.add([7, 8, 3], generations["plain"], ASKED)]
            batch = [driver.add([5, 4], generations[name], ASKED) for name in mates]
            driver.finish([batch[0], watched[0], batch[1], watched[1], batch[2]], 3)
            answers.append([driver.samples[s.sequence_id] for s in watched])
        assert answers[0] == answers[1] == answers[2]
