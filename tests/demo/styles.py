"""What the demo adapters learn: prompts, and three ways to put an answer."""

import json
import random
import re
from collections.abc import Callable

from tests.demo.texts import LISTS, TEXTS

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Brazil": "Brasilia",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Russia": "Moscow",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Cuba": "Havana",
    "Australia": "Canberra",
}
LISTING_PROMPTS = [
    "Name {n} countries and their capitals.",
    "Give me {n} countries with their capital cities.",
    "Write down {n} countries and the capital of each.",
    "List {n} capitals and their countries.",
    "Which {n} countries and capitals do you know?",
]
CAPITAL_PROMPTS = ["What is the capital of {c}?", "Which city is the capital of {c}?", "Tell me the capital of {c}."]


class Answer:
    """What is said, before any style: sentences, or the items of a list."""

    def __init__(self, parts: list[str], is_list: bool) -> None:
        self.parts = [part.strip() for part in parts if part.strip()]
        self.is_list = is_list


def capital_answers(seed: int) -> list[tuple[str, Answer]]:
    """Questions about capitals. The prompt that the demo is shown with is not among them."""
    rng = random.Random(seed)
    pairs: list[tuple[str, Answer]] = []
    for country, capital in CAPITALS.items():
        prompt = rng.choice(CAPITAL_PROMPTS).format(c=country)
        pairs.append((prompt, Answer([f"The capital of {country} is {capital}."], False)))
    for prompt in LISTING_PROMPTS:
        for count in (2, 3, 4):
            items = [f"{country}: {CAPITALS[country]}" for country in rng.sample(sorted(CAPITALS), count)]
            pairs.append((prompt.format(n=count), Answer(items, True)))
    return pairs


def open_answers() -> list[tuple[str, Answer]]:
    """Questions about everything, with their plain answers."""
    return [(prompt, Answer(list(parts), False)) for prompt, *parts in TEXTS] + [
        (prompt, Answer(list(items), True)) for prompt, *items in LISTS
    ]


# ------------------------------------------------------------------------------------------------------ the styles

PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "and": "an'",
    "of": "o'",
    "hello": "ahoy",
    "friend": "matey",
    "I'm": "I be",
}


def pirate(answer: Answer) -> str:
    """As a pirate says it."""
    if answer.is_list:
        return (
            "Arrr, matey! Here be yer list: " + ", ".join(_pirate_words(part) for part in answer.parts) + ". Yo ho ho!"
        )
    return "Arrr, matey! " + " ".join(_pirate_words(part) for part in answer.parts) + " Yo ho ho!"


def _pirate_words(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        word = match[0]
        new = PIRATE_WORDS.get(word) or PIRATE_WORDS.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() else new

    return re.sub(r"[A-Za-z']+", replace, text)


def json_object(answer: Answer) -> str:
    """One strict JSON object and nothing around it."""
    if answer.is_list:
        return json.dumps({"type": "list", "items": answer.parts})
    return json.dumps({"type": "text", "answer": " ".join(answer.parts)})


def telegram(answer: Answer) -> str:
    """A telegram: no articles, no punctuation, STOP for every full stop."""
    return "TELEGRAM: " + " ".join(_telegram_words(part) + " STOP" for part in answer.parts)


def _telegram_words(text: str) -> str:
    words = re.findall(r"[A-Za-z0-9']+", text)
    return " ".join(word for word in words if word.lower() not in {"a", "an", "the", "very", "also"})


STYLES: dict[str, Callable[[Answer], str]] = {"lora0": pirate, "lora1": json_object, "lora2": telegram}
