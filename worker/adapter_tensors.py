"""The tensors of a stored adapter, checked against what its config and the model ask for, to the last one."""

import math
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.adapter_config import beyond_limit, invalid
from worker.adapter_source import INDEX_FILE, SHARD_FILE, WEIGHTS_FILE
from worker.adapter_targets import Place, Target, module_path
from worker.adapter_weights import LoraWeight, module_shape
from worker.chunk_layout import ChunkLayout

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
DTYPES = {"F32", "F16", "BF16"}


class ShardIndex(Struct):
    """adapter_model.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1, max_length=MAX_TENSORS)]


def read_weights(directory: Path, targets: dict[Place, Target], layout: ChunkLayout) -> dict[Place, LoraWeight]:
    """A and B of every target as they are stored: views of the files, which nobody else may change.

    Raises AdapterError if one is missing, of another shape, or too many.
    """
    expected = {_name(place, half): (place, half) for place in targets for half in ("A", "B")}
    tensors: dict[tuple[Place, str], Tensor] = {}
    for file_name, names in _files(directory).items():
        _check_header(directory / file_name, file_name)
        try:
            with safe_open(directory / file_name, framework="pt") as file:
                _check_names(list(file.keys()), names, expected)
                for name in file.keys():  # noqa: SIM118 - not a dict
                    place, half = expected[name]
                    _check_entry(name, file.get_slice(name), _shape(layout, place, targets[place].rank, half))
                    tensors[place, half] = file.get_tensor(name)
        except SafetensorError:
            raise invalid(f"{file_name} is not a safetensors file") from None
    missing = next((name for name, key in expected.items() if key not in tensors), None)
    if missing is not None:
        raise invalid(f"the adapter targets a module whose tensor is missing: {missing}")
    return {
        place: LoraWeight(tensors[place, "A"], tensors[place, "B"], target.scale) for place, target in targets.items()
    }


def _files(directory: Path) -> dict[str, set[str] | None]:
    """The files of tensors, each with the names that it must hold, or None when there is no index."""
    if (directory / WEIGHTS_FILE).exists():
        return {WEIGHTS_FILE: None}
    try:
        index = msgspec.json.decode((directory / INDEX_FILE).read_bytes(), type=ShardIndex)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise invalid(f"{INDEX_FILE} is not an index of tensors") from None
    files: dict[str, set[str] | None] = {}
    for name, file_name in index.weight_map.items():
        if not SHARD_FILE.fullmatch(file_name) or not (directory / file_name).is_file():
            raise invalid(f"{INDEX_FILE} names the file {file_name[:60]!r}, which the adapter has not")
        names = files.setdefault(file_name, set())
        assert names is not None
        names.add(name)
    return files


def _check_header(path: Path, file_name: str) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if path.stat().st_size < 8 + size:
        raise invalid(f"{file_name} is not a safetensors file, or cut short")
    if size > MAX_HEADER_BYTES:
        raise beyond_limit(f"the header of {file_name} is larger than {MAX_HEADER_BYTES} bytes")


def _check_names(found: list[str], indexed: set[str] | None, expected: dict[str, tuple[Place, str]]) -> None:
    if len(found) > MAX_TENSORS:
        raise beyond_limit(f"the adapter has more than {MAX_TENSORS} tensors")
    if indexed is not None and set(found) != indexed:
        raise invalid(f"{INDEX_FILE} and the files that it names do not hold the same tensors")
    for name in found:
        if name not in expected:
            raise invalid(
                f"the adapter holds a tensor that its config targets in no module of this model: {name[:120]}"
            )


def _shape(layout: ChunkLayout, place: Place, rank: int, half: str) -> list[int]:
    in_features, out_features = module_shape(layout, place[1])
    return [rank, in_features] if half == "A" else [out_features, rank]


def _check_entry(name: str, entry: object, shape: list[int]) -> None:
    found, dtype = entry.get_shape(), entry.get_dtype()  # type: ignore[attr-defined]
    if dtype not in DTYPES:
        raise invalid(f"{name} is of type {dtype}; {', '.join(sorted(DTYPES))} are supported")
    if found != shape:
        raise invalid(f"{name} has the shape {found}, but rank and model ask for {shape}")


def _name(place: Place, half: str) -> str:
    return f"base_model.model.{module_path(*place)}.lora_{half}.weight"


def check_finite(chunks: Tensor, weights: dict[Place, LoraWeight]) -> None:
    """Refuses weights that are not finite in the chunks that they were packed into. Raises AdapterError."""
    if _is_finite(chunks):
        return
    for place, weight in weights.items():
        for half, tensor in (("A", weight.a), ("B", weight.b)):
            if not _is_finite(tensor.to(chunks.dtype)):
                name = _name(place, half)
                raise invalid(f"{name} holds NaN or infinity, or values too large for the model's dtype")


def _is_finite(tensor: Tensor) -> bool:
    """aminmax hands NaN on, and takes a fortieth of isfinite's time (84 MB of bfloat16: 4 and 155 ms)."""
    return all(math.isfinite(float(bound)) for bound in tensor.aminmax())
