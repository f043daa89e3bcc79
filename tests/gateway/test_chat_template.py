"""Chat templates: as transformers renders them, and nothing that a template may not do."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from gateway.chat_template import ChatTemplate, ChatTemplateError
from tests import tiny_model

TOOLS = (
    "{{- bos_token }}{%- for m in messages %}\n"
    "    {%- if m.role == 'skip' %}\n        {%- continue %}\n    {%- endif %}"
    "[{{ m['role'] }}]{% generation %}{{ m.content | trim }}{% endgeneration %}{{ m | tojson }}\n{%- endfor %}\n"
    "{% if add_generation_prompt %}\n[assistant]{% endif %}{{ missing is defined }}{{ loop }}"
)
MESSAGES = [
    {"role": "system", "content": " <be> 'kind'\n"},
    {"role": "skip", "content": ""},
    {"role": "user", "content": "é"},
]


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options.setdefault("max_chars", 100_000)
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


@pytest.mark.parametrize("source", [tiny_model.TEMPLATE, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source: str, prompt: bool) -> None:
    ours = render(source, MESSAGES, add_generation_prompt=prompt)
    theirs, _ = render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=prompt, bos_token="<s>", tools=None, documents=None
    )
    assert ours == theirs[0]


def test_tools_are_rendered_as_transformers_does() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "<é> & 'x'"}}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]}]
    source = "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}" + TOOLS
    theirs, _ = render_jinja_template([messages], chat_template=source, tools=tools, bos_token="<s>", documents=None)
    assert render(source, messages, tools=tools, add_generation_prompt=False) == theirs[0]


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=20)), min_size=1, max_size=5))
@settings(max_examples=50)
def test_any_content_is_as_transformers_renders_it(pairs: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in pairs]
    theirs, _ = render_jinja_template([messages], chat_template=tiny_model.TEMPLATE, add_generation_prompt=True)
    assert render(tiny_model.TEMPLATE, messages) == theirs[0]


def test_the_final_message_is_continued() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is "}]
    prompt = render(tiny_model.TEMPLATE, messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nThe answer is ")
    stripping = "{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"
    assert render(stripping, messages, continue_final_message=True) == "<q><The answer is"
    with pytest.raises(ChatTemplateError, match="does not show"):
        render("nothing", messages, continue_final_message=True)


def test_a_templates_own_refusal_reaches_the_user() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(99999) %}xxxxxxxxxx{% endfor %}",
        "{{ messages[0].content.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_a_bad_template_fails_its_request_only(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(source, MESSAGES)
    assert "Traceback" not in str(caught.value)
    assert "__" not in str(caught.value)


def test_a_template_that_does_not_parse() -> None:
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        ChatTemplate("{% for %}", {})


def test_the_date_is_at_hand() -> None:
    assert len(render("{{ strftime_now('%Y') }}", MESSAGES)) == 4
