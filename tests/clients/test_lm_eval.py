"""lm-eval's local-completions on tasks of made-up data: log-likelihoods, choices, perplexity and generation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.echo_worker import echo_logprobs
from tests.gateway.test_openai_routes import TOKENIZER, chat_prompt, expected

DOCS = [
    {"text": "the rain in", "target": " Spain", "other": " no land"},
    {"text": "a red", "target": " fox", "other": "x"},
]
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {name}
doc_to_text: "{{{{text}}}}"
"""
TASKS = {
    "loglikelihood": 'doc_to_target: "{{target}}"\ntarget_delimiter: ""\n'
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "multiple_choice": 'doc_to_choice: "{{[target, other]}}"\ndoc_to_target: 0\ntarget_delimiter: ""\n'
    "metric_list: [{metric: acc}]\n",
    "loglikelihood_rolling": 'doc_to_target: "{{text}}{{target}}"\nmetric_list: [{metric: word_perplexity}]\n',
    "generate_until": 'doc_to_target: "{{target}}"\ngeneration_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 6}\n'
    "metric_list: [{metric: exact_match}]\n",
}  # fmt: skip
SEED = 1234  # it sends this one
LmEval = Callable[..., dict[str, Any]]


@pytest.fixture
def lm_eval(tmp_path: Path, tokenizer_directory: Path, run_tool: Callable[..., str]) -> LmEval:
    """Runs tasks with a kind of model at an address; the samples of each task as it saw them, in their order."""

    def lm_eval(kind: str, url: str, tasks: list[str], *options: str) -> dict[str, Any]:
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, DOCS)))
        for name in tasks:
            (tmp_path / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + TASKS[name])
        model = f"model=lora0,base_url={url},tokenizer_backend=huggingface,tokenizer={tokenizer_directory}"
        run_tool(
            "lm_eval", "run", "--model", kind, "--model_args", f"{model},max_retries=1,num_concurrent=2", *options,
            "--include_path", str(tmp_path), "--tasks", ",".join(tasks), "--output_path", "out", "--log_samples",
        )  # fmt: skip
        samples = {}
        for name in tasks:
            [path] = tmp_path.glob(f"out/*/samples_{name}_[0-9]*.jsonl")
            samples[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda s: s["doc_id"])
        return samples

    return lm_eval


def loglikelihood(context: str, text: str) -> float:
    """What the echo worker makes of a text after a context."""
    tokens = TOKENIZER.encode(context + text, False)[len(TOKENIZER.encode(context, False)) :]
    return sum(echo_logprobs(token, 1).logprob for token in tokens)


def numbers(sample: dict[str, Any]) -> list[float]:
    """The log-likelihoods of a sample's requests."""
    return [float(answers[0][0]) for answers in sample["resps"]]


def test_completions(url: str, lm_eval: LmEval) -> None:
    samples = lm_eval("local-completions", f"{url}/completions", list(TASKS), "--batch_size", "2")
    for i, doc in enumerate(DOCS):
        text, target = doc["text"], doc["target"]
        assert numbers(samples["loglikelihood"][i]) == [loglikelihood(text, target)]
        assert numbers(samples["multiple_choice"][i]) == [loglikelihood(text, doc[key]) for key in ("target", "other")]
        [[rolling]] = samples["loglikelihood_rolling"][i]["resps"]  # after the end of another text
        assert float(rolling) == loglikelihood("", text + target)
        assert samples["generate_until"][i]["resps"] == [[expected(text, "x", 6, SEED)]]


def test_chat_completions(url: str, lm_eval: LmEval) -> None:
    samples = lm_eval("local-chat-completions", f"{url}/chat/completions", ["generate_until"], "--apply_chat_template")
    for doc, sample in zip(DOCS, samples["generate_until"], strict=True):
        assert sample["resps"] == [[expected(chat_prompt(doc["text"]), "x", 6, SEED)]]
