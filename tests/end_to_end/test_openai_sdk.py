"""What the README shows: the OpenAI SDK, pointed at one URL, under the base's name and the adapters'."""

import openai
import pytest

from tests.end_to_end.servers import QUESTION


@pytest.fixture(scope="module")
def client(demo_server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=demo_server + "/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, model: str, **extra: object) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=48,
        extra_body=extra,
    )
    assert reply.model == model
    return reply.choices[0].message.content or ""


def test_models_lists_the_base_and_the_loaded_adapters(client: openai.OpenAI) -> None:
    base, *adapters = client.models.list().data
    assert [card.id for card in adapters] == ["lora0", "lora1", "lora2"]
    assert {getattr(card, "parent", None) for card in adapters} == {base.id}
    assert client.models.retrieve("lora1").id == "lora1"
    assert client.models.retrieve(f"{base.id}:lora1").id == f"{base.id}:lora1"


def test_every_name_answers_with_its_own_content(client: openai.OpenAI) -> None:
    base = client.models.list().data[0].id
    answers = {model: ask(client, model) for model in (base, "lora0", "lora1", "lora2")}
    assert len(set(answers.values())) == 4, answers
    assert ask(client, f"{base}:lora0") == answers["lora0"]


def test_adapters_are_mixed_and_scaled_through_extra_body(client: openai.OpenAI) -> None:
    """As the README shows: half pirate and half telegram; each alone, with nothing of the other; and the base."""
    base = client.models.list().data[0].id

    def mix(**weights: float) -> str:
        return ask(client, base, lora_path=[{"name": name, "weight": weight} for name, weight in weights.items()])

    both = mix(lora0=0.6, lora2=0.6)
    assert both.startswith("Arrr") and both.endswith("STOP")
    assert both == mix(lora2=0.6, lora0=0.6)
    assert mix(lora0=1, lora2=0) == mix(lora0=1) == ask(client, "lora0", lora_scale=1) == ask(client, "lora0")
    assert mix(lora0=0) == ask(client, "lora0", lora_scale=0) == ask(client, base)
    with pytest.raises(openai.NotFoundError) as caught:
        mix(lora0=0.5, lora9=0.5)
    assert caught.value.param == "lora_path[1].name"


def test_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    pieces = []
    stream = client.chat.completions.create(
        model="lora0",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for chunk in stream:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(pieces) == ask(client, "lora0")
    assert usage is not None
    assert 0 < usage.completion_tokens <= 48


def test_unknown_names_are_404(client: openai.OpenAI) -> None:
    base = client.models.list().data[0].id
    for model in ("lora9", f"{base}:lora9", "other:lora0"):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, model)
        assert caught.value.code == "model_not_found"
