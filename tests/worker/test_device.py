"""What the settings that depend on the device come to."""

import dataclasses

import torch

from worker.config import WorkerConfig
from worker.device import find_target


def test_answers_take_the_place_of_prompt_tokens_on_a_gpu_up_to_half_of_them() -> None:
    target = find_target(WorkerConfig(device="cpu", chunked_prefill_size=1024))
    assert [target.prefill_budget(n) for n in (0, 1, 300)] == [1024, 1024, 1024]
    on_gpu = dataclasses.replace(target, device=torch.device("cuda"))
    assert [on_gpu.prefill_budget(n) for n in (0, 1, 128)] == [1024, 511, 384], "few answers: half of the rows"
    assert [on_gpu.prefill_budget(n) for n in (129, 256, 600)] == [895, 768, 512]
    tiny = dataclasses.replace(on_gpu, chunked_prefill_size=1)
    assert [tiny.prefill_budget(n) for n in (0, 1, 128, 129)] == [1, 1, 1, 1], "a prompt always goes on"
