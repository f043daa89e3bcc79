"""The runner: what a sequence gets does not depend on splits, blocks, neighbours or what stood in its blocks before."""

from pathlib import Path

import pytest
import torch

from protocol.sampling import SamplingParams
from tests.tiny_models import write_tiny_model
from tests.worker.driver import GREEDY, Driver, outputs

PROMPT = [5, 9, 300, 17, 44, 8, 123, 250, 61, 2, 12]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("chunk", [1, 2, 5, 10])
def test_chunked_prefill_is_whole_prefill(model_dir: Path, block_size: int, chunk: int) -> None:
    answers = []
    for size in (1 << 30, chunk):
        driver = Driver.of(model_dir, block_size=block_size)
        sequence = driver.add(PROMPT)
        driver.finish([sequence], 8, size)
        answers.append(driver.samples[0])
    assert [sample.token_id for sample in answers[0]] == [sample.token_id for sample in answers[1]]
    for whole, split in zip(*answers, strict=True):
        assert whole.logprob == pytest.approx(split.logprob, abs=1e-5)


def test_a_prompt_that_is_not_done_yields_nothing(model_dir: Path) -> None:
    driver = Driver.of(model_dir)
    sequence = driver.add(PROMPT)
    driver.step([(sequence, 4)])
    assert driver.samples[0] == []


def test_samples_come_in_the_order_of_the_batch(model_dir: Path) -> None:
    alone = []
    for prompt in (PROMPT, PROMPT[3:]):
        driver = Driver.of(model_dir)
        driver.step([(driver.add(prompt), len(prompt))])
        alone.append(driver.samples[0][0].token_id)
    driver = Driver.of(model_dir)
    first, unfinished, last = driver.add(PROMPT), driver.add(PROMPT), driver.add(PROMPT[3:])
    driver.step([(first, 11), (unfinished, 3), (last, 8)])
    assert outputs(first) + outputs(unfinished) + outputs(last) == alone


def test_seeded_sampling_survives_preemption_and_company(model_dir: Path) -> None:
    sampling = SamplingParams(max_tokens=64, temperature=1.2, top_p=0.95, top_k=50)
    driver = Driver.of(model_dir)
    alone = driver.add(PROMPT, sampling=sampling, seed=77)
    driver.finish([alone], 12)

    driver = Driver.of(model_dir)
    sequence = driver.add(PROMPT, sampling=sampling, seed=77)
    mates = [driver.add(PROMPT[i:], sampling=sampling, seed=i) for i in range(1, 4)]
    driver.finish([sequence], 5)
    sequence.num_computed_tokens = 0  # preempted: all is recomputed, in other blocks
    sequence.block_table.clear()
    driver.finish([mates[0], sequence, *mates[1:]], 12, chunk=6)
    assert outputs(sequence) == outputs(alone)
    driver = Driver.of(model_dir)
    other = driver.add(PROMPT, sampling=sampling, seed=78)
    driver.finish([other], 12)
    assert outputs(other) != outputs(alone)


def test_not_a_number_stays_with_its_sequence_and_out_of_its_blocks(model_dir: Path) -> None:
    driver = Driver.of(model_dir, num_blocks=12)
    driver.runner.model.embed_tokens[319] = torch.nan
    bad, good = driver.add([7, 319, 8]), driver.add(PROMPT)
    driver.step([(bad, 3), (good, len(PROMPT))])
    driver.finish([good], 6)
    assert [sample.failed for sample in driver.samples[0]] == [True]
    assert not any(sample.failed for sample in driver.samples[1])
    driver.free += bad.block_table + good.block_table
    mates = [driver.add([3]), driver.add(PROMPT)]
    driver.finish(mates, 6)
    assert outputs(mates[1]) == outputs(good)
    assert not any(sample.failed for mate in mates for sample in driver.samples[mate.sequence_id])


def test_an_adapter_that_is_not_resident_is_an_error_never_the_base_model(model_dir: Path) -> None:
    driver = Driver.of(model_dir, num_chunks=1)
    with pytest.raises(KeyError):
        driver.step([(driver.add(PROMPT, generation=4), len(PROMPT))])


def test_sequences_are_not_changed(model_dir: Path) -> None:
    driver = Driver.of(model_dir)
    sequence = driver.add(PROMPT, sampling=GREEDY)
    sequence.block_table = [3, 1, 2]
    driver.runner.launch([sequence.share(len(PROMPT))]).collect()
    assert (sequence.token_ids, sequence.num_computed_tokens, sequence.block_table) == (PROMPT, 0, [3, 1, 2])


def test_decodes_of_very_different_contexts_in_one_step(model_dir: Path) -> None:
    prompts = [PROMPT, [7 + i % 300 for i in range(300)], PROMPT[:2], [9 + i % 200 for i in range(280)]]
    alone = []
    for prompt in prompts:
        driver = Driver.of(model_dir, block_size=16)
        sequence = driver.add(prompt)
        driver.finish([sequence], 6)
        alone.append(outputs(sequence))
    driver = Driver.of(model_dir, block_size=16)
    sequences = [driver.add(prompt) for prompt in prompts]
    driver.finish(sequences, 6)
    assert [outputs(sequence) for sequence in sequences] == alone
