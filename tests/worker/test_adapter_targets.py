"""What PEFT makes of an adapter config, our loader makes of it too: same modules, ranks and ΔW."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from protocol.errors import ErrorCode
from tests.worker.adapter_files import LAYOUT, TinyModel, config, delta
from worker.adapter_config import AdapterError, parse_config
from worker.adapter_loader import AdapterLoader
from worker.adapter_packer import AdapterLimits
from worker.adapter_targets import find_targets, module_path
from worker.chunk_layout import MODULES


@pytest.fixture(scope="module")
def new_model() -> Callable[[], PreTrainedModel]:
    tiny = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
    )
    return lambda: LlamaForCausalLM(tiny)


CASES: dict[str, dict[str, Any]] = {
    "one module": {"target_modules": ["k_proj"]},
    "attention and gate, rank 4": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]},
    "rank 20 on all, rslora": {"r": 20, "lora_alpha": 7, "use_rslora": True, "target_modules": list(MODULES)},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.layers\.1\..*(q|down)_proj"},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "1.mlp.up_proj"]},
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "exclude regex": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*0\.mlp.*"},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
    "a full name in another layer": {
        "target_modules": ["q_proj", "model.layers.0.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "layers and pattern": {"target_modules": ["o_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "rank pattern": {"target_modules": list(MODULES), "rank_pattern": {"q_proj": 17, "layers.1.mlp.up_proj": 2}},
    "alpha pattern": {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 32, "^model.layers.0.*": 5}},
    "overlapping patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"(k|v)_proj": 5, r".*\.0\..*_proj": 3, "q_proj": 9},  # in the order that saving brings
        "alpha_pattern": {"self_attn.q_proj": 1, "layers.1.self_attn.q_proj": 2},
    },
}


# PEFT 0.21 asks transformers 5.23 by a name that the latter is about to drop.
@pytest.mark.parametrize("case", CASES)
def test_deltas_are_those_of_peft(case: str, new_model: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    torch.manual_seed(len(case))
    lora = LoraConfig(**{"r": 8, "lora_alpha": 16, "init_lora_weights": False, **CASES[case]})
    get_peft_model(new_model(), lora).save_pretrained(tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(new_model(), tmp_path / "adapter")  # not as saved: PEFT sorts the patterns
    loader = AdapterLoader(TinyModel(), torch.float32, AdapterLimits(max_chunks=8), tmp_path / "store")
    packed = loader.load(str(tmp_path / "adapter"), trusted=True)
    seen = set()
    for layer in range(LAYOUT.num_layers):
        for module in MODULES:
            layer_of_peft = peft_model.base_model.model.get_submodule(module_path(layer, module))
            if hasattr(layer_of_peft, "get_delta_weight"):
                expected = layer_of_peft.get_delta_weight("default")
                torch.testing.assert_close(delta(packed, layer, module), expected, rtol=1e-5, atol=1e-5)
                seen.add(module)
            else:
                assert packed.scales[layer, MODULES.index(module)] == 0
                assert delta(packed, layer, module).count_nonzero() == 0
    assert set(packed.modules) == seen


def test_the_pattern_that_unsloth_writes() -> None:
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj"
        r").*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
    )
    found = find_targets(parse_config(encoded(target_modules=pattern)), 12)
    assert {module for _, module in found} == {"q_proj", "v_proj"} and len(found) == 24


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_pattern_that_never_ends_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.adapter_patterns.TIME_LIMIT_S", 0.3)
    before = time.monotonic()
    with pytest.raises(AdapterError, match=f"{key}: matching took longer") as refused:
        find_targets(parse_config(encoded(**{key: r"(.*.*)*(.*.*)*(.|.)*!"})), 2)
    assert refused.value.error.code is ErrorCode.ADAPTER_INVALID
    assert time.monotonic() - before < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "(q_proj"}, "target_modules: not a regular expression"),
        ({"rank_pattern": {"[": 2}}, "rank_pattern: not a regular expression"),
        ({"target_modules": ["c_attn"]}, "'c_attn' is no module"),
        ({"target_modules": ["q_proj", "_proj"]}, "'_proj' is no module"),
        ({"target_modules": ["q_proj", "lm_head"]}, "holds lm_head"),
        ({"target_modules": ".*(q_proj|embed_tokens)"}, "holds embed_tokens"),
        ({"target_modules": "nothing.*"}, "matches no module"),
        ({"layers_to_transform": [7]}, "matches no module"),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "matches no module"),
        ({"target_modules": "x" * 5000}, "target_modules: at most 4000 characters"),
        ({"rank_pattern": {str(number): 2 for number in range(5000)}}, "rank_pattern: there may be at most 4096"),
        ({"target_modules": ["q_proj"] * 5000}, "target_modules may have at most 4096"),
    ],
)
def test_targets_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message.replace("(", r"\(")):
        find_targets(parse_config(encoded(**changes)), 2)


def encoded(**changes: Any) -> bytes:
    return json.dumps(config(**changes)).encode()
