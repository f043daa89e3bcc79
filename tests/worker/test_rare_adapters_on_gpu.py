"""DoRA and LoRA of embed_tokens and lm_head through the Triton runner, mixed with plain adapters, against PEFT.

Needs a GPU, where it runs in float32 with and without CUDA graphs, or Triton's interpreter, where it takes a minute.
"""

import os
import random
from pathlib import Path

import pytest

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
GRAPH_ROWS = [0, 20] if DEVICE.type == "cuda" else [0]


@pytest.mark.parametrize("graph_rows", GRAPH_ROWS)
def test_all_mixed(
    files: Path, expected: dict[str, tuple[Answer, list[float]]], tmp_path: Path, graph_rows: int
) -> None:
    driver = triton_driver(files / "model", num_chunks=NUM_CHUNKS, graph_rows=graph_rows)
    generations = load_all(driver, files, tmp_path / "store")
    rng = random.Random(5)
    rows = [(name, driver.add(PROMPT, generation, ASKED)) for name, generation in [*generations.items()] * 2]
    while unfinished := [s for _, s in rows if s.num_tokens - s.num_prompt_tokens < NUM_OUTPUTS]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        driver.step_ahead([(s, rng.randint(1, s.num_uncomputed_tokens)) for s in chosen])
    driver.collect()
    for name, sequence in rows:
        check(driver, sequence, expected[name])


def test_plain_and_base_rows_are_the_same_to_the_bit_whatever_is_beside_them(files: Path, tmp_path: Path) -> None:
    for graph_rows in GRAPH_ROWS:
        driver = triton_driver(files / "model", num_chunks=NUM_CHUNKS, graph_rows=graph_rows)
        generations = load_all(driver, files, tmp_path / f"store{graph_rows}")
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
