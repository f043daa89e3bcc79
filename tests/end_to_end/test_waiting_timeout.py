"""`--req-waiting-timeout`: what waits too long is a 429 with Retry-After, streamed or not, and leaves nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.end_to_end.tiny_server import PROMPT, ask, put, tiny_server, write_adapter

NUM_REQUESTS = 40
BODY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 200, "ignore_eos": True}


def test_a_flood_is_served_as_far_as_it_can_be_in_time(tmp_path: Path) -> None:
    """One at a time, 40 of 200 tokens: however fast the machine, the last are not begun within 0.2 s."""
    for number, name in enumerate("ab"):
        write_adapter(tmp_path / "adapters" / name, number)
    limits = [
        "--max-running-requests",
        "1",
        "--req-waiting-timeout",
        "0.2",
        "--adapter-concurrency",
        str(NUM_REQUESTS),
    ]
    with tiny_server(tmp_path, *limits) as client:
        for name in "ab":
            assert put(client, name, name).status_code == 200
            assert ask(client, name).status_code == 200  # it is on the device

        def request(number: int) -> httpx.Response:
            body = {**BODY, "model": "ab"[number % 2], "stream": number % 4 > 1}
            return client.post("/v1/completions", json=body)

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            replies = list(pool.map(request, range(NUM_REQUESTS)))
        assert {reply.status_code for reply in replies} == {200, 429}
        for reply in replies:
            if reply.status_code == 429:
                error = reply.json()["error"]
                assert error["code"] == "rate_limit_exceeded" and "within 0.2 s" in error["message"]
                assert reply.headers["retry-after"] == "1"
        for name in "ab":
            assert ask(client, name).status_code == 200, "its places in the quota are free again"
            gone = client.delete(f"/v1/adapters/{name}?timeout=10")
            assert (gone.status_code, gone.json()["in_flight"]) == (200, 0)
