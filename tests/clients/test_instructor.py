"""instructor: Pydantic models out of a chat, in each of its modes."""

import instructor
import openai
import pytest

from tests.clients.test_openai_python import CALL, ROME, City, Say
from tests.gateway.test_openai_routes import HI

pytestmark = pytest.mark.filterwarnings("ignore")  # its own


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (instructor.Mode.TOOLS, CALL),
        (instructor.Mode.JSON, ROME),
        (instructor.Mode.JSON_SCHEMA, ROME),
        (instructor.Mode.MD_JSON, f"```json\n{ROME}\n```"),
    ],
)
def test_models_come_out(url: str, say: Say, mode: instructor.Mode, said: str) -> None:
    say(said)
    with openai.OpenAI(base_url=url, api_key="none") as plain:
        client = instructor.from_openai(plain, mode=mode)
        city = client.chat.completions.create(model="lora0", messages=HI, response_model=City, max_retries=0)
    assert (city.name, city.population) == ("Rome", 3)  # a class of its own
