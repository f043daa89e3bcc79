"""How a Generation becomes an HTTP response, whole or as server-sent events. Either ends with the client's leaving."""

import asyncio
import logging
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.errors import ApiError, internal
from gateway.generation import Delta, Generation

logger = logging.getLogger(__name__)

WRITE_STALL_S = 30.0  # a client that takes nothing for so long is given up
_SSE_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}


class Writer(Protocol):
    """One route's wire shape."""

    def chunks(self, deltas: list[Delta], generation: Generation) -> bytes:
        """The events of some deltas."""
        ...

    def last(self, generation: Generation) -> bytes:
        """The events that end a complete stream."""
        ...

    def whole(self, answers: list[Delta], generation: Generation) -> bytes:
        """The body of an answer that is not streamed."""
        ...


async def _close_when_gone(receive: Receive, generation: Generation) -> None:
    """Waits for the client to leave. Until then nothing arrives, as the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.close()


async def collect(generation: Generation, num_answers: int) -> list[Delta]:
    """All deltas of each choice, joined."""
    texts: list[list[str]] = [[] for _ in range(num_answers)]
    answers = [Delta(i, "", [], []) for i in range(num_answers)]
    while deltas := await generation.next():
        for delta in deltas:
            answer = answers[delta.index]
            texts[delta.index].append(delta.text)
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs
            answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
            answer.finish_reason, answer.stop_reason = delta.finish_reason, delta.stop_reason
    for answer, pieces in zip(answers, texts, strict=True):
        answer.text = "".join(pieces)
    return answers


class WholeResponse(Response):
    """Runs the generation to its end and answers with one JSON body."""

    def __init__(self, generation: Generation, writer: Writer, num_answers: int) -> None:
        super().__init__(media_type="application/json")
        self._generation = generation
        self._writer = writer
        self._num_answers = num_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        watcher = asyncio.create_task(_close_when_gone(receive, generation))
        try:
            answers = await collect(generation, self._num_answers)
            if generation.closed:
                return
            generation.observe()
            self.body = self._writer.whole(answers, generation)
            self.headers["content-length"] = str(len(self.body))
            await super().__call__(scope, receive, send)
        finally:
            generation.abort()
            watcher.cancel()


class EventStream(Response):
    """Sends each delta as it comes. Nothing is sent before the first, so an early failure is still an HTTP error."""

    def __init__(self, generation: Generation, writer: Writer) -> None:
        super().__init__(headers=_SSE_HEADERS)
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._sent_s: float | None = None  # since when a piece waits to be taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        watcher = asyncio.create_task(_close_when_gone(receive, generation))
        stall = asyncio.create_task(self._end_when_stalled(asyncio.current_task()))
        try:
            deltas = await generation.next()
            if generation.closed:
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            last = await self._send_all(deltas, send)
            if not generation.closed:
                await send({"type": "http.response.body", "body": last})
        finally:
            generation.abort()
            watcher.cancel()
            stall.cancel()

    async def _send_all(self, deltas: list[Delta], send: Send) -> bytes:
        """Sends the deltas, and what comes after them, and returns the end of the stream."""
        generation, writer, loop = self._generation, self._writer, asyncio.get_running_loop()
        try:
            while deltas:
                self._sent_s = loop.time()
                await send({"type": "http.response.body", "body": writer.chunks(deltas, generation), "more_body": True})
                self._sent_s = None
                deltas = await generation.next()
        except ApiError as error:
            return b"data: " + error.body() + b"\n\n"
        except Exception:
            logger.exception("a stream failed")
            return b"data: " + internal().body() + b"\n\n"
        generation.observe()
        return writer.last(generation)

    async def _end_when_stalled(self, task: "asyncio.Task[None] | None") -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WRITE_STALL_S / 2)
            if self._sent_s is not None and loop.time() - self._sent_s > WRITE_STALL_S and task is not None:
                task.cancel("the client took nothing for too long")
                return
