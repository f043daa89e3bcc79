"""`--adapter-resolver`: a name in the directory is loaded by its first request, once, and not after an unload."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from tests.end_to_end.tiny_server import HIDDEN, ask, tensors, tiny_server, tokens, write_adapter


def with_magnitudes() -> dict[str, torch.Tensor]:
    made = tensors(4)
    queries = [name.removesuffix("lora_A.weight") for name in made if "lora_A" in name]
    return made | {f"{name}lora_magnitude_vector": torch.rand(HIDDEN) for name in queries}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resolver")
    write_adapter(directory / "found" / "a", 1)
    write_adapter(directory / "found" / "team" / "b", 2)
    write_adapter(directory / "found" / "bad", 3, use_dora=True)
    write_adapter(directory / "found" / "lengths", 4, weights=with_magnitudes(), use_dora=True)
    write_adapter(directory / "secret", 4)
    (directory / "adapters").mkdir()
    (directory / "found" / "out").symlink_to(directory / "secret")
    return directory


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    with tiny_server(root, "--adapter-resolver", str(root / "found")) as client:
        yield client


def test_names_are_found_on_first_use_and_revoked_by_an_unload(client: httpx.Client) -> None:
    base = tokens(ask(client, None))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: tokens(ask(client, name)), ["a", "team/b"] * 4))
    assert len({tuple(answer) for answer in [base, *answers]}) == 3
    lines = client.get("/v1/adapters").json()["data"]
    assert sorted((line["name"], line["state"]) for line in lines) == [("a", "ready"), ("team/b", "ready")]
    assert sorted(line["generation"] for line in lines) == [1, 2], "the requests share a load"
    model = client.get("/v1/models").json()["data"][0]["id"]
    assert tokens(client.post("/generate", json={"input_ids": [5], "lora_path": f"{model}:a"}))
    assert client.delete("/v1/adapters/a").json()["state"] == "removed"
    assert ask(client, "a").status_code == 404, "unloading is revoking"
    assert client.put("/v1/adapters/a", json={}).status_code == 200, "an administrator brings it back"
    assert tokens(ask(client, "a")) == answers[0]


def test_the_packer_knows_the_base_models_weights(client: httpx.Client) -> None:
    assert tokens(ask(client, "lengths")) != tokens(ask(client, None))
    assert client.delete("/v1/adapters/lengths").json()["state"] == "removed"


def test_what_is_not_there_or_not_right_is_never_the_base(client: httpx.Client) -> None:
    for name in ("nothing", "out", "../secret", "a/../../secret", ".", "team", "a/adapter_config.json"):
        response = ask(client, name)
        assert response.status_code in (400, 404), (name, response.text)
        assert "secret" not in response.text.replace(name, "")
    refused = ask(client, "bad")
    assert refused.status_code == 400 and "use_dora" in refused.json()["error"]["message"]
    assert sorted(line["name"] for line in client.get("/v1/adapters").json()["data"]) == ["a", "team/b"]
