"""Names: what `model` in a request stands for. Pure functions over the names that are known."""

import re
from collections.abc import Collection

from gateway.errors import UnknownAdapter, invalid, model_not_found
from gateway.mixes import Adapter, weighted_sum
from gateway.schemas import WeightedAdapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def resolve(model: str, bases: Collection[str], adapters: Collection[str]) -> str | None:
    """The adapter that a model name asks for, or None for the base model.

    An exact match wins, of a base name first; then the name is split after a known base name, so that "base:adapter"
    works where names themselves contain colons. Raises the 404 of an unknown name.
    """
    if model in bases:
        return None
    if model in adapters:
        return model
    halves = [model[len(base) + 1 :] for base in bases if model.startswith(base + ":")]
    for adapter in halves:
        if adapter in adapters:
            return adapter
    raise model_not_found(model, next(iter(halves), None))


def resolve_with_lora_path(
    model: str,
    lora_path: str | list[WeightedAdapter] | None,
    bases: Collection[str],
    adapters: Collection[str],
    param: str = "lora_path",
) -> Adapter:
    """Like resolve, with SGLang's `lora_path`: it selects an adapter, or a mix, where `model` names the base model.

    param: what errors about lora_path name.
    """
    adapter = resolve(model, bases, adapters)
    if lora_path is None:
        return adapter
    if isinstance(lora_path, str):
        chosen: Adapter = _resolve_named(lora_path, bases, adapters, param)
        names = [chosen]
    else:
        members = _resolve_members(lora_path, bases, adapters, param)
        chosen, names = weighted_sum(members.items()), list(members)
    if adapter is not None and names != [adapter]:
        raise invalid(param, f"{param} and model name two different adapters.")
    return chosen


def _resolve_named(name: str, bases: Collection[str], adapters: Collection[str], param: str) -> str | None:
    try:
        return resolve(name, bases, adapters)
    except UnknownAdapter as unknown:
        message = f"{param}: no adapter {name[:200]!r} is loaded."
        raise UnknownAdapter(unknown.adapter, message, param) from None


def _resolve_members(
    mix: list[WeightedAdapter], bases: Collection[str], adapters: Collection[str], param: str
) -> dict[str, float]:
    """Names and weights of a mix."""
    members: dict[str, float] = {}
    for i, entry in enumerate(mix):
        of_entry = f"{param}[{i}].name"
        name = _resolve_named(entry.name, bases, adapters, of_entry)
        if name is None:
            raise invalid(of_entry, f"{of_entry} is the base model, to which every mix is added.")
        if name in members:
            raise invalid(of_entry, f"{of_entry}: {name!r} is in the mix already.")
        members[name] = 1.0 if entry.weight is None else entry.weight
    return members


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be called so."""
    return _NAME.fullmatch(name) is not None


def check_adapter_name(name: str, param: str = "lora_name") -> None:
    """Raises a 400 if the name cannot be an adapter's."""
    if not is_adapter_name(name):
        raise invalid(
            param,
            f"{param} must be 1 to 128 letters, digits and . _ : / - and begin with a letter or a digit.",
        )
