"""What structured output costs the host: compiling a schema, and the mask of allowed tokens at each step.

    python -m tests.bench.bench_grammars [--schemas 50] [--csv FILE]

llguidance as the worker uses it and, where it is installed, xgrammar, on SmolLM2's tokenizer and the schemas of
tests/json_schemas.py. Each answer is followed along a value that its schema accepts.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from protocol.sampling import Grammar
from tests.bench.results import append_csv, machine
from tests.json_schemas import Pair, schemas
from worker.grammar import load_tokenizer, new_matcher
from worker.model_source import DEFAULT_MODEL, resolve_model

EOS = 2
Times = dict[str, list[float]]


def timed(times: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = function(*arguments)
    times.append(time.perf_counter() - started)
    return result


def follow(times: Times, mask: Callable[[], Any], accept: Callable[[int], Any], ids: list[int]) -> None:
    """Every step of one answer; the first mask apart, as it includes what was not compiled at once."""
    for i, token in enumerate(ids):
        timed(times["mask" if i else "first mask"], mask)
        timed(times["accept"], accept, token)


def measure_llguidance(path: Path, tokenizer: Tokenizer, pairs: list[Pair]) -> Times:
    times: Times = defaultdict(list)
    own = timed(times["tokenizer"], load_tokenizer, path, tokenizer.get_vocab_size(), (EOS,))
    for schema, value in pairs:
        grammar = Grammar("json_schema", json.dumps(schema))
        matcher = timed(times["compile"], new_matcher, own, grammar)
        follow(times, matcher.mask, matcher.accept, tokenizer.encode(json.dumps(value)).ids)
    return times


def measure_xgrammar(tokenizer: Tokenizer, pairs: list[Pair]) -> Times:
    import xgrammar

    def load() -> Any:
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
        kind = xgrammar.VocabType.BYTE_LEVEL
        info = xgrammar.TokenizerInfo(vocabulary, vocab_type=kind, vocab_size=len(vocabulary), stop_token_ids=[EOS])
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    times: Times = defaultdict(list)
    compiler = timed(times["tokenizer"], load)
    bits = xgrammar.allocate_token_bitmask(1, tokenizer.get_vocab_size())
    for schema, value in pairs:
        text = json.dumps(schema)
        compiled = timed(times["compile"], compiler.compile_json_schema, text)
        matcher = xgrammar.GrammarMatcher(compiled)
        ids = tokenizer.encode(json.dumps(value)).ids
        follow(times, partial(matcher.fill_next_token_bitmask, bits), matcher.accept_token, ids)
    return times


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=50, help="how many")
    parser.add_argument("--csv", type=Path, help="append the results here")
    options = parser.parse_args()
    path = resolve_model(DEFAULT_MODEL) / "tokenizer.json"
    tokenizer, pairs = Tokenizer.from_file(str(path)), schemas(options.schemas)
    found = {"llguidance": measure_llguidance(path, tokenizer, pairs)}
    try:
        found["xgrammar"] = measure_xgrammar(tokenizer, pairs)
    except ImportError:
        print("xgrammar is not installed")
    metrics = {}
    for library, times in found.items():
        for name, values in times.items():
            ordered = sorted(value * 1e6 for value in values)
            for label, at in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
                metrics[f"{library}_{name.replace(' ', '_')}_{label}_us"] = ordered[int(at * (len(ordered) - 1))]
    for metric, value in metrics.items():
        print(f"{metric:40} {value:10.4g}")
    if options.csv:
        append_csv(options.csv, machine(1), "grammars", metrics)


if __name__ == "__main__":
    main()
