"""The tensors of a stored adapter, checked against what its config and the model ask for, to the last one."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.adapter_config import beyond_limit, invalid
from worker.adapter_source import INDEX_FILE, SHARD_FILE, WEIGHTS_FILE
from worker.adapter_targets import EMBEDDINGS, HEAD, OUTSIDE, Place, Target, module_path
from worker.adapter_weights import LoraWeight, module_shape
from worker.checkpoint import Checkpoint
from worker.chunk_layout import ChunkLayout

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
DTYPES = {"F32", "F16", "BF16"}
ROWS_AT_ONCE = 4096  # of embeddings


class ShardIndex(Struct):
    """adapter_model.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Meta(min_length=1, max_length=MAX_TENSORS)]


def read_weights(
    directory: Path,
    targets: dict[Place, Target],
    layout: ChunkLayout,
    has_magnitudes: bool = False,
    base: Checkpoint | None = None,
) -> dict[Place, LoraWeight]:
    """A, B and with has_magnitudes DoRA's magnitude of every target as they are stored: views of the files, which
    nobody else may change.

    base: the model's own tensors, for what PEFT saves of them beside. Raises AdapterError if a tensor is missing, of
    another shape, or too many.
    """
    halves = ("A", "B", "magnitude") if has_magnitudes else ("A", "B")
    expected = {tensor_name(place, half): (place, half) for place in targets for half in halves}
    copies = _copies_of_base(targets, layout)
    tensors: dict[tuple[Place, str], Tensor] = {}
    for file_name, names in _files(directory).items():
        _check_header(directory / file_name, file_name)
        try:
            with safe_open(directory / file_name, framework="pt") as file:
                _check_names(list(file.keys()), names, expected.keys() | copies.keys())
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in copies:
                        _check_copy(name, file.get_slice(name), copies[name], base)
                        continue
                    place, half = expected[name]
                    _check_entry(name, file.get_slice(name), _shape(layout, place, targets[place].rank, half))
                    tensors[place, half] = file.get_tensor(name)
        except SafetensorError:
            raise invalid(f"{file_name} is not a safetensors file") from None
    missing = next((name for name, key in expected.items() if key not in tensors), None)
    if missing is not None:
        why = " (use_dora)" if expected[missing][1] == "magnitude" else ""
        raise invalid(f"the adapter targets a module whose tensor is missing: {missing}{why}")
    return {
        place: LoraWeight(tensors[place, "A"], tensors[place, "B"], target.scale, tensors.get((place, "magnitude")))
        for place, target in targets.items()
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


def _check_names(found: list[str], indexed: set[str] | None, expected: Collection[str]) -> None:
    if len(found) > MAX_TENSORS:
        raise beyond_limit(f"the adapter has more than {MAX_TENSORS} tensors")
    if indexed is not None and set(found) != indexed:
        raise invalid(f"{INDEX_FILE} and the files that it names do not hold the same tensors")
    for name in found:
        if name not in expected:
            raise invalid(
                f"the adapter holds a tensor that its config targets in no module of this model: {name[:120]}"
            )


def _copies_of_base(targets: dict[Place, Target], layout: ChunkLayout) -> dict[str, str]:
    """Tensors of the base model that PEFT saves with an adapter of the embeddings or the head; which they copy."""
    if layout.edges is None or not any(layer == OUTSIDE for layer, _ in targets):
        return {}
    sources = {EMBEDDINGS: EMBEDDINGS, HEAD: EMBEDDINGS if layout.edges.is_tied else HEAD}
    return {
        f"base_model.model.{module_path(*place)}{infix}.weight": f"{module_path(*source)}.weight"
        for place, source in sources.items()
        for infix in ("", ".base_layer")
    }


def _check_copy(name: str, entry: Any, source: str, base: Checkpoint | None) -> None:
    """Refuses base weights that are not this model's, to the precision of either's dtype."""
    if base is None:
        raise invalid(f"{name} cannot be compared with the base model's")
    _check_entry(name, entry, base.shape(source))
    for start in range(0, entry.get_shape()[0], ROWS_AT_ONCE):
        found = entry[start : start + ROWS_AT_ONCE]
        own = base.rows(source, start, start + len(found))
        if not torch.equal(found.to(own.dtype), own) and not torch.equal(found, own.to(found.dtype)):
            raise invalid(f"{name} differs from the base model's, and only low-rank changes are applied")


def _shape(layout: ChunkLayout, place: Place, rank: int, half: str) -> list[int]:
    in_features, out_features = module_shape(layout, place[1])
    return {"A": [rank, in_features], "B": [out_features, rank]}.get(half, [out_features])


def _check_entry(name: str, entry: object, shape: list[int]) -> None:
    found, dtype = entry.get_shape(), entry.get_dtype()  # type: ignore[attr-defined]
    if dtype not in DTYPES:
        raise invalid(f"{name} is of type {dtype}; {', '.join(sorted(DTYPES))} are supported")
    if found != shape:
        raise invalid(f"{name} has the shape {found}, but rank and model ask for {shape}")


def tensor_name(place: Place, half: str) -> str:
    """PEFT's name of a module's A, B or magnitude."""
    module = f"base_model.model.{module_path(*place)}"
    if half == "magnitude":
        return f"{module}.lora_magnitude_vector"
    return f"{module}.lora_embedding_{half}" if place == EMBEDDINGS else f"{module}.lora_{half}.weight"


def check_finite(chunks: Sequence[Tensor], weights: dict[Place, LoraWeight]) -> None:
    """Refuses weights that are not finite in the chunks that they were packed into. Raises AdapterError."""
    if all(map(_is_finite, chunks)):
        return
    for place, weight in weights.items():
        for half, tensor in (("A", weight.a), ("B", weight.b)):
            check_tensor(place, half, tensor, chunks[0].dtype)


def check_tensor(place: Place, half: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuses a tensor that is not finite in this dtype. Raises AdapterError."""
    if not _is_finite(tensor.to(dtype)):
        raise invalid(f"{tensor_name(place, half)} holds NaN or infinity, or values too large for the model's dtype")


def _is_finite(tensor: Tensor) -> bool:
    """aminmax hands NaN on, and takes a fortieth of isfinite's time (84 MB of bfloat16: 4 and 155 ms)."""
    return all(math.isfinite(float(bound)) for bound in tensor.aminmax())
