"""What names mean."""

import pytest

from gateway.errors import ApiError
from gateway.registry import check_adapter_name, resolve, resolve_with_lora_path

BASES = ["org/base", "org/base:v2", "base"]
ADAPTERS = ["lora0", "a:b", "org/base:v2:x", "v2", "base:lora0:y"]


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("org/base", None),
        ("base", None),
        ("org/base:v2", None),  # exact: a base's name wins over base:adapter
        ("lora0", "lora0"),
        ("base:lora0", "lora0"),
        ("org/base:v2:lora0", "lora0"),
        ("base:a:b", "a:b"),
        ("a:b", "a:b"),
        ("org/base:v2:x", "org/base:v2:x"),
        ("base:v2", "v2"),
    ],
)
def test_names(model: str, adapter: str | None) -> None:
    assert resolve(model, BASES, ADAPTERS) == adapter


@pytest.mark.parametrize("model", ["", "nope", "nope:lora0", "base:nope", "base:", ":lora0", "lora0:base", "BASE", "a"])
def test_unknown_names_are_404_and_tell_nothing(model: str) -> None:
    with pytest.raises(ApiError) as caught:
        resolve(model, BASES, ADAPTERS)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert "org/base:v2:x" not in caught.value.message


def test_lora_path() -> None:
    assert resolve_with_lora_path("base", "lora0", BASES, ADAPTERS) == "lora0"
    assert resolve_with_lora_path("lora0", "lora0", BASES, ADAPTERS) == "lora0"
    assert resolve_with_lora_path("base", None, BASES, ADAPTERS) is None
    with pytest.raises(ApiError, match="two different"):
        resolve_with_lora_path("lora0", "v2", BASES, ADAPTERS)
    with pytest.raises(ApiError) as caught:
        resolve_with_lora_path("base", "nope", BASES, ADAPTERS)
    assert (caught.value.status, caught.value.param) == (404, "lora_path")


@pytest.mark.parametrize("name", ["", "a b", "-a", "a\n", "é", "a" * 129, "../x\0"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ApiError):
        check_adapter_name(name)
