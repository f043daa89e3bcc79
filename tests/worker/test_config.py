"""Flags: every one in the help, unknown ones refused, values that cannot work named."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from worker.config import DEFAULT_MODEL, AdapterSpec, ConfigError, WorkerConfig, add_options, config_from


def parse(*arguments: str) -> WorkerConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_options(parser)
    return config_from(parser.parse_args(arguments))


def test_defaults_are_the_dataclass() -> None:
    assert parse() == WorkerConfig()
    assert parse().endpoint == "" and parse().listen_on.startswith("ipc:///")


def test_the_default_model_is_the_one_that_can_be_had_anywhere() -> None:
    from worker import model_source

    assert DEFAULT_MODEL == model_source.DEFAULT_MODEL


def test_every_setting_has_help_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = parser.format_help()
    for setting in fields(WorkerConfig):
        assert "--" + setting.name.replace("_", "-") in text
    assert text.count("(default:") == len(fields(WorkerConfig))


def test_lora_paths_in_their_three_forms_and_vllms() -> None:
    config = parse(
        "--lora-paths",
        "/adapters/first",
        "second=org/adapter=1",
        '{"lora_name": "third", "lora_path": "p", "pinned": true}',
        "org/fourth",
        "--lora-modules",
        "fifth=/x",
    )
    assert config.lora_paths == (
        AdapterSpec("first", "/adapters/first"),
        AdapterSpec("second", "org/adapter=1"),
        AdapterSpec("third", "p", True),
        AdapterSpec("org/fourth", "org/fourth"),
        AdapterSpec("fifth", "/x"),
    )
    assert config.lora_enabled and not parse().lora_enabled and parse("--enable-lora").lora_enabled


def test_weights_are_given_by_name() -> None:
    config = parse("--adapter-weights", "gold=4", "team/a:b=0.5", "--adapter-weights", "base=2")
    assert config.adapter_weights == (("gold", 4.0), ("team/a:b", 0.5), ("base", 2.0))
    assert parse().schedule_policy == "vtc"


def test_repeatable_flags(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    roots = str(tmp_path), str(tmp_path / "a")
    config = parse(
        "--adapter-root", roots[0], "--adapter-root", roots[1], "--hub-allow", "org/*", "--served-model-name", "x", "y"
    )
    assert (config.adapter_root, config.hub_allow, config.served_model_name) == (roots, ("org/*",), ("x", "y"))


@pytest.mark.parametrize("flag", ["--adapter-root", "--adapter-resolver"])
def test_directories_of_adapters_must_be_there(flag: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nope", "file"):
        with pytest.raises(ConfigError, match=f"^{flag} {tmp_path / name}: no such directory$"):
            parse("--adapter-root", str(tmp_path), flag, str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tp-size", "2"], "--tp-size"),
        (["--device", "cpu", "--lora-backend", "triton"], "GPU"),
        (["--endpoint", "tcp://0.0.0.0:1"], "CURVE"),
        (["--endpoint", "ipc://@x"], "absolute"),
        (["--max-loaded-loras", "4"], "--max-loras-per-batch"),
        (["--max-loras-per-batch", "1", "--max-loaded-loras", "1", "--lora-paths", "a=1", "b=2"], "--max-loaded-loras"),
        (["--lora-paths", "a=1", "a=2"], "twice"),
        (["--lora-paths", "a=1", "--served-model-name", "a"], "twice"),
        (["--lora-paths", "a="], "no path"),
        (["--lora-paths", "bad name=1"], "no adapter name"),
        (["--lora-paths", '{"lora_name": "a"}'], "lora_path"),
        (["--lora-paths", '{"lora_name": "a", "lora_path": "b", "pin": true}'], "pin"),
        (["--max-loras-per-batch", "1", "--lora-paths", '{"lora_name":"a","lora_path":"b","pinned":true}'], "pinned"),
        (["--lora-target-modules", "q_proj", "embed"], "embed"),
        (["--max-lora-rank", "64", "--num-lora-chunks", "2"], "rank 32"),
        (["--mem-fraction", "0"], "--mem-fraction"),
        (["--mem-fraction", "nan"], "--mem-fraction"),
        (["--max-running-requests", "0"], "--max-running-requests"),
        (["--context-length", "1"], "--context-length"),
        (["--shutdown-grace", "-1"], "--shutdown-grace"),
        (["--req-waiting-timeout", "-1"], "--req-waiting-timeout must be 0 to 86400 seconds"),
        (["--schedule-policy", "lpm"], "--schedule-policy"),
        (["--adapter-weights", "a=2", "b"], "--adapter-weights: 'b'"),
        (["--adapter-weights", "a=0"], "0.01 to 100"),
        (["--adapter-weights", "a=nan"], "0.01 to 100"),
    ],
)
def test_values_that_cannot_work_are_named(arguments: list[str], word: str) -> None:
    with pytest.raises((ConfigError, argparse.ArgumentError), match=word):
        parse(*arguments)


@pytest.mark.parametrize(
    "arguments", [["--cuda-graph-max-batch-size", "8"], ["--model", "x"], ["--lora-eviction-policy", "random"], ["x"]]
)
def test_unknown_options_are_errors(arguments: list[str]) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse(*arguments)
