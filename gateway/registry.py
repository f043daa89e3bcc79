"""Names: what `model` in a request stands for. Pure functions over the names that are known."""

import re
from collections.abc import Collection

from gateway.errors import UnknownAdapter, invalid, model_not_found

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
    model: str, lora_path: str | None, bases: Collection[str], adapters: Collection[str]
) -> str | None:
    """Like resolve, with SGLang's `lora_path`: it selects an adapter where `model` names the base model."""
    adapter = resolve(model, bases, adapters)
    if lora_path is None:
        return adapter
    try:
        chosen = resolve(lora_path, bases, adapters)
    except UnknownAdapter as unknown:
        message = f"lora_path: no adapter {lora_path[:200]!r} is loaded."
        raise UnknownAdapter(unknown.adapter, message, "lora_path") from None
    if adapter is not None and chosen != adapter:
        raise invalid("lora_path", "lora_path and model name two different adapters.")
    return chosen


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
