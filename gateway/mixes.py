"""Mixes: weighted sums of adapters, as requests name them. What is one in form alone becomes an adapter or the base."""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.errors import invalid
from protocol.messages import MAX_MIX_WEIGHT

SEVERAL = "(mix)"  # no adapter can be called so


@dataclass(frozen=True, slots=True)
class Mix:
    """Several adapters, or one whose weight is not 1: names and weights, by name, none 0."""

    members: tuple[tuple[str, float], ...]


Adapter = str | Mix | None  # what a sequence runs with; None: the base model


def weighted_sum(members: Iterable[tuple[str, float]]) -> Adapter:
    """The mix of these. Weight 0 takes an adapter out; if nothing is left, that is the base model, as was asked."""
    live = sorted((name, weight) for name, weight in members if weight)
    if not live:
        return None
    return live[0][0] if len(live) == 1 and live[0][1] == 1.0 else Mix(tuple(live))


def members_of(adapter: Adapter) -> tuple[tuple[str, float], ...]:
    """Names and weights."""
    if isinstance(adapter, Mix):
        return adapter.members
    return () if adapter is None else ((adapter, 1.0),)


def scaled(adapter: Adapter, scale: float) -> Adapter:
    """An adapter or mix times `lora_scale`. Raises the 400 of the base model, and of a weight that is too large."""
    members = members_of(adapter)
    if not members:
        raise invalid("lora_scale", "lora_scale needs an adapter, and this request names none.")
    if any(abs(weight * scale) > MAX_MIX_WEIGHT for _, weight in members):
        message = f"lora_scale times a weight of lora_path must be between -{MAX_MIX_WEIGHT:g} and {MAX_MIX_WEIGHT:g}."
        raise invalid("lora_scale", message)
    return weighted_sum((name, weight * scale) for name, weight in members)


def names_of(adapters: Iterable[Adapter]) -> list[str]:
    """Every adapter in them, once."""
    return list(dict.fromkeys(name for adapter in adapters for name, _ in members_of(adapter)))


def label(adapter: Adapter) -> str | None:
    """Under what it is counted."""
    names = names_of([adapter])
    return SEVERAL if len(names) > 1 else next(iter(names), None)
