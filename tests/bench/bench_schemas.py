"""How much of JSON Schema structured output serves, and whether what it lets through fits.

    python -m tests.bench.bench_schemas [--schemas 500]

Half of the schemas are plain, half use rarer keywords (tests/json_schemas.py). Each that compiles is followed along a
random answer of SmolLM2's tokens, any that the masks allow but fond of ending; answers that come to their end are
checked with the jsonschema package. Exits with 1 if one does not fit.
"""

import argparse
import json
import random
import sys
from collections import Counter
from typing import Any

import jsonschema
from tokenizers import Tokenizer

from protocol.sampling import Grammar
from tests.json_schemas import rarer_schemas, schemas
from worker.grammar import GrammarError, Matcher, load_tokenizer, new_matcher
from worker.model_source import DEFAULT_MODEL, resolve_model

EOS = 2
MAX_TOKENS = 600
CLOSING = ['"', '",', '"}', "}", "}}", "]", "]}", ","]  # taken where they can be, half of the time


def answer(matcher: Matcher, tokenizer: Tokenizer, closing: list[int], rng: random.Random) -> str | None:
    """A random answer, if it came to its end."""
    ids: list[int] = []
    while len(ids) < MAX_TOKENS:
        mask = matcher.mask()
        allowed = [8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
        ending = [token for token in closing if mask[token // 8] >> token % 8 & 1]
        token = EOS if EOS in allowed else rng.choice(ending if ending and rng.random() < 0.5 else allowed)
        matcher.accept(token)
        if token == EOS:
            return str(tokenizer.decode(ids))
        ids.append(token)
    return None


def main() -> int:
    """Runs it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=500, help="how many")
    options = parser.parse_args()
    path = resolve_model(DEFAULT_MODEL) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    own = load_tokenizer(path, tokenizer.get_vocab_size(), (EOS,))
    closing = [token for text in CLOSING if (token := tokenizer.token_to_id(text)) is not None]
    plain = [schema for schema, _ in schemas(options.schemas // 2)]
    rng, refusals, counts = random.Random(0), Counter[str](), Counter[str]()
    for schema in [*plain, *rarer_schemas(options.schemas - len(plain), seed=1)]:
        try:
            text = answer(new_matcher(own, Grammar("json_schema", json.dumps(schema))), tokenizer, closing, rng)
        except GrammarError as error:
            refusals[str(error)[:80]] += 1
            continue
        counts[_check(schema, text)] += 1
    print(f"{options.schemas} schemas: {sum(counts.values())} served, {sum(refusals.values())} refused")
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    for reason, number in refusals.most_common():
        print(f"{number:5} refused: {reason}")
    return int(counts["wrong"] > 0)


def _check(schema: dict[str, Any], text: str | None) -> str:
    if text is None:
        return f"cut at {MAX_TOKENS} tokens"
    try:
        jsonschema.validate(json.loads(text), schema)
    except (jsonschema.ValidationError, json.JSONDecodeError) as error:
        print(f"wrong: {error.args[0][:200]}: {text[:300]!r}", file=sys.stderr)
        return "wrong"
    return "complete and right"


if __name__ == "__main__":
    sys.exit(main())
