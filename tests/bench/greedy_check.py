"""Whether greedy streams that differ do so by rounding: their own tokens, scored by the server that said them.

A greedy token is the likeliest one under its adapter behind all tokens before it. Computed in batches of another shape
sums are added in another order, and where two tokens are almost alike the other may win; from there on the texts have
nothing in common. So a stream is not compared with another but with what it should be: how far each of its tokens falls
short of the likeliest at its place, in nats, when the whole stream is read as a prompt under its adapter. Rounding
makes that small everywhere; another adapter's weights, or KV that is not the stream's, do not.

What is small, the server says itself: four times the most by which streams fall short that nothing was beside. And that
the check can tell, the same streams show, read under an adapter that is not theirs.
"""

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.bench.serving_client import Load, post

NUM_AT_ONCE = 4
QUIET_WORSTS = 4  # the bound: of some thousand tokens the worst is now and then twice as much
LEAST_NATS = 1e-3  # of the bound: float32 rounds less


@dataclass(frozen=True, slots=True)
class Stream:
    """A greedy answer."""

    model: str
    prompt: list[int]
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Parted:
    """A stream that is not what was expected."""

    stream: Stream
    expected: int  # its place among the quiet ones
    window: str = ""  # where it was


def shortfalls(load: Load, stream: Stream, model: str = "") -> list[float]:
    """By how many nats each token is less likely than the likeliest at its place. model: in place of the stream's."""
    body = {
        "model": model or stream.model,
        "prompt": [*stream.prompt, *stream.token_ids],
        "max_tokens": 0,
        "echo": True,
        "logprobs": 1,
    }
    _, content = post(load, "/v1/completions", body)
    scores = json.loads(content)["choices"][0]["logprobs"]
    said = slice(len(stream.prompt), len(body["prompt"]))
    pairs = zip(scores["top_logprobs"][said], scores["token_logprobs"][said], strict=True)
    return [max(top.values()) - logprob for top, logprob in pairs]


def check(load: Load, quiet: Sequence[Stream], parted: Sequence[Parted]) -> tuple[dict[str, float], list[str]]:
    """Figures, and a line for each stream that has parted. quiet: of several models, with nothing beside them.

    parted_by_more_than_rounding and foreign_unnoticed must be 0; the latter counts quiet streams that pass for those of
    another's adapter. Worst and mean are of tokens, least_foreign the worst token of the stream where it is least.
    """
    models = sorted({stream.model for stream in quiet})
    others = dict(zip(models, [*models[1:], models[0]], strict=True))
    with ThreadPoolExecutor(NUM_AT_ONCE) as executor:
        of_quiet = list(executor.map(lambda stream: shortfalls(load, stream), quiet))
        of_foreign = list(executor.map(lambda stream: shortfalls(load, stream, others[stream.model]), quiet))
        of_parted = list(executor.map(lambda each: shortfalls(load, each.stream), parted))
    foreign = [max(nats) for nats in of_foreign]
    bound = max(QUIET_WORSTS * max(map(max, of_quiet)), LEAST_NATS)
    metrics = {
        "quiet_worst_nats": max(map(max, of_quiet)),
        "quiet_mean_nats": _mean(of_quiet),
        "parted": len(parted),
        "parted_worst_nats": max(map(max, of_parted), default=0.0),
        "parted_mean_nats": _mean(of_parted),
        "parted_by_more_than_rounding": sum(max(nats) > bound for nats in of_parted),
        "least_foreign_nats": min(foreign),
        "foreign_unnoticed": sum(nats <= bound for nats in foreign),
    }
    lines = []
    for each, nats in zip(parted, of_parted, strict=True):
        pairs = zip(each.stream.token_ids, quiet[each.expected].token_ids, strict=True)
        first = next(i for i, (said, expected) in enumerate(pairs) if said != expected)
        verdict = "rounding" if max(nats) <= bound else "MORE THAN ROUNDING"
        lines.append(
            f"{each.window} {each.stream.model} parts at token {first}, {nats[first]:.3g} nats short, the expected"
            f" one {of_quiet[each.expected][first]:.3g}; the worst of all {max(nats):.3g} at"
            f" {nats.index(max(nats))}: {verdict} (up to {bound:.3g})"
        )
    return metrics, lines


def _mean(of_streams: Sequence[list[float]]) -> float:
    return statistics.mean(nats for of_stream in of_streams for nats in of_stream) if of_streams else 0.0
