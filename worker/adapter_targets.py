"""Which modules of the model an adapter config targets, and with what rank and scale, matched as PEFT matches them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from worker.adapter_config import CONFIG_FILE, AdapterConfig, beyond_limit, invalid
from worker.adapter_patterns import MAX_PATTERNS, Pattern, match_all
from worker.chunk_layout import MODULES, EdgeLayout

T = TypeVar("T")

Place = tuple[int, str]  # layer, module

OUTSIDE = -1  # the layer of what stands in none
EMBEDDINGS = (OUTSIDE, "embed_tokens")
HEAD = (OUTSIDE, "lm_head")
EDGE_PATHS = {"model.embed_tokens": EMBEDDINGS, "lm_head": HEAD}
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = "all-linear"  # every linear layer but the output head


@dataclass(frozen=True, slots=True)
class Target:
    """The rank and the scale of one targeted module in one layer."""

    rank: int
    scale: float


def module_path(layer: int, module: str) -> str:
    """A module's name inside the model, as in model.layers.0.self_attn.q_proj."""
    if layer == OUTSIDE:
        return "lm_head" if module == "lm_head" else f"model.{module}"
    return f"model.layers.{layer}.{'self_attn' if module in ATTENTION_MODULES else 'mlp'}.{module}"


def find_targets(config: AdapterConfig, num_layers: int, edges: EdgeLayout | None = None) -> dict[Place, Target]:
    """Every targeted module of a model with num_layers layers. Raises AdapterError if there is none.

    edges: the model's, if its embeddings and its head may be targeted.
    """
    places = {module_path(layer, module): (layer, module) for layer in range(num_layers) for module in MODULES}
    places |= EDGE_PATHS
    chosen = _chosen(list(places), config)
    chosen_edges = chosen & EDGE_PATHS.keys()
    if chosen_edges:
        _check_edges(config, min(chosen_edges), edges)
        if edges is not None and edges.is_tied and config.ensure_weight_tying:
            chosen |= EDGE_PATHS.keys()  # PEFT then changes both, and saves both
    if not chosen:
        raise invalid(f"{CONFIG_FILE}: target_modules matches no module of this model")
    paths = [path for path in places if path in chosen]
    ranks = _first_values("rank_pattern", config.rank_pattern or {}, paths)
    alphas = _first_values("alpha_pattern", config.alpha_pattern or {}, paths)
    targets = {}
    for path in paths:
        rank = ranks.get(path, config.r)
        alpha = alphas.get(path, config.lora_alpha)
        targets[places[path]] = Target(rank, alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
    return targets


def _check_edges(config: AdapterConfig, path: str, edges: EdgeLayout | None) -> None:
    name = path.split(".")[-1]
    if config.use_dora:
        raise invalid(f"{CONFIG_FILE}: use_dora with {name} among target_modules is not supported")
    if edges is None:
        raise invalid(
            f"{CONFIG_FILE}: target_modules holds {name}, which is not supported: for so few layers this model's"
            " vocabulary is too large"
        )


def _chosen(paths: list[str], config: AdapterConfig) -> set[str]:
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = set(paths) - EDGE_PATHS.keys()
    elif isinstance(targets, str):
        chosen = set(match_all([Pattern("target_modules", targets, targets, "fullmatch")], paths)[0])
    else:
        chosen = _named("target_modules", targets, paths, must_exist=True)
        # To PEFT, a path that is written out stands for itself, whatever the layers.
        chosen = (chosen & _in_layers(paths, config)) | chosen.intersection(targets)
    excludes = config.exclude_modules or []
    if isinstance(excludes, str):
        return chosen - set(match_all([Pattern("exclude_modules", excludes, excludes, "fullmatch")], paths)[0])
    return chosen - _named("exclude_modules", excludes, paths, must_exist=False)


def _named(key: str, names: list[str], paths: list[str], must_exist: bool) -> set[str]:
    """The paths that are, or end in, one of the names. A name that must exist and does not is refused."""
    if len(names) > MAX_PATTERNS:
        raise beyond_limit(f"{CONFIG_FILE}: {key} may have at most {MAX_PATTERNS} entries")
    by_suffix: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split(".")
        for start in range(len(parts)):
            by_suffix.setdefault(".".join(parts[start:]), set()).add(path)
    for name in names:
        if must_exist and name not in by_suffix:
            raise invalid(f"{CONFIG_FILE}: {key}: {name[:80]!r} is no module of this model")
    return set().union(*(by_suffix.get(name, set()) for name in names))


def _in_layers(paths: list[str], config: AdapterConfig) -> set[str]:
    layers, given = config.layers_to_transform, config.layers_pattern or []
    if layers is None or layers == []:
        return set(paths)
    wanted = {layers} if isinstance(layers, int) else set(layers)
    names = [given] if isinstance(given, str) else given
    patterns = [Pattern("layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names]
    patterns = patterns or [Pattern("layers_pattern", "any", r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    index_of: dict[str, str] = {}
    for matched in match_all(patterns, paths):
        index_of = matched | index_of  # the first pattern that matches decides
    return {path for path, index in index_of.items() if index and int(index) in wanted}


def _first_values(key: str, values: Mapping[str, T], paths: list[str]) -> dict[str, T]:
    """By path, the value of the first pattern that matches the path's end."""
    patterns = [Pattern(key, text, rf"(.*\.)?({text})$") for text in values]
    found: dict[str, T] = {}
    for value, matched in zip(values.values(), match_all(patterns, paths), strict=True):
        found = dict.fromkeys(matched, value) | found
    return found
