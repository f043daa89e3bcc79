"""ModelText: what a worker's tokenizer files say about text: tokenizer, chat template, default sampling."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.chat_template import ChatTemplate, ChatTemplateError
from gateway.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What the model's authors recommend, from generation_config.json; OpenAI's defaults where they say nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ModelText:
    """Everything the gateway knows of a model's text. Read-only, safe in any thread."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, defaults: SamplingDefaults) -> None:
        self.tokenizer = tokenizer
        self.template = template  # None: the model is not made for chat
        self.defaults = defaults

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "ModelText":
        """Reads the files of a model directory that concern text. Raises ValueError if the tokenizer is not usable."""
        if "tokenizer.json" not in files:
            raise ValueError("the worker offers no tokenizer.json")
        config = _json_object(files, "tokenizer_config.json")
        special = _json_object(files, "special_tokens_map.json")
        tokens = {name: _token(config.get(name, special.get(name))) for name in _SPECIAL_TOKENS}
        source = files.get("chat_template.jinja", b"").decode("utf-8") or _template_of(config)
        template = None
        if source:
            try:
                template = ChatTemplate(source, {name: token for name, token in tokens.items() if token is not None})
            except ChatTemplateError as error:
                logger.error("%s; the model serves completions only", error)
        return cls(Tokenizer(files["tokenizer.json"]), template, _sampling_defaults(files))


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    value = json.loads(files[name])
    return value if isinstance(value, dict) else {}


def _token(value: Any) -> str | None:
    """A special token is written as a string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_of(config: Mapping[str, Any]) -> str:
    """tokenizer_config.json holds one template, or several with names."""
    templates = config.get("chat_template")
    if isinstance(templates, list):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        templates = named.get("default")
    return templates if isinstance(templates, str) else ""


def _sampling_defaults(files: Mapping[str, bytes]) -> SamplingDefaults:
    config = _json_object(files, "generation_config.json")
    said = {name: config[name] for name in SamplingDefaults.__struct_fields__ if config.get(name) is not None}
    if config.get("do_sample") is False:  # then the rest is leftovers
        said = {}
    try:
        return msgspec.convert(said, SamplingDefaults)
    except msgspec.ValidationError as error:
        logger.warning("generation_config.json is not used: %s", error)
        return SamplingDefaults()
