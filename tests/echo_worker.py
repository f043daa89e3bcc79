"""A worker without a model: it answers with tokens that anyone can compute, and misbehaves when told to.

It speaks the protocol from its own reading of it, and imports nothing of the worker.

    python -m tests.echo_worker --endpoint ipc:///tmp/x/worker.sock [--control ipc:///tmp/x/control.sock] [--delay-ms 1]

The control socket (REQ) takes one JSON object, {"do": ...}: die, hang, mute, drop, gone, delay, say, stats.
Told to say some tokens, it answers everything with them and the end of text, until it is told to say nothing; with
`then`, only the next request, and all after it with those.
"""

import argparse
import hashlib
import json
import os
import signal
import time
import zlib
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from protocol import DEAD_AFTER_S, FILE_CHUNK_BYTES, HEARTBEAT_INTERVAL_S, MAX_FRAME_BYTES
from protocol.codec import decode_command
from protocol.errors import Error, ErrorCode, ProtocolError
from protocol.messages import (
    Abort,
    AdapterChanged,
    AdapterEntry,
    AdapterInfo,
    AdapterList,
    AdapterMemory,
    AdapterReply,
    AdapterState,
    AdapterUsage,
    AnyEvent,
    CommandEnvelope,
    FetchFile,
    FileChunk,
    FileInfo,
    FinishReason,
    Generate,
    Goodbye,
    Hello,
    ListAdapters,
    LoadAdapter,
    ModelCard,
    Output,
    Outputs,
    Reject,
    TokenLogprobs,
    UnloadAdapter,
    Welcome,
    WorkerHeartbeat,
    WorkerStatus,
)
from protocol.session import EventSender, Receiver
from tests import tiny_model

BASE = "echo/base"
EOS = 2
NUM_SPECIAL = len(tiny_model.SPECIAL)


def echo_key(prompt: list[int], digest: str, seed: int | None) -> bytes:
    """What an answer depends on."""
    return hashlib.sha256(json.dumps([prompt, digest, seed or 0]).encode()).digest()


def echo_token(key: bytes, i: int) -> int:
    """Token i of the answer: any but the special ones."""
    return NUM_SPECIAL + zlib.crc32(key + i.to_bytes(4, "little")) % (tiny_model.VOCAB_SIZE - NUM_SPECIAL)


def echo_tokens(prompt: list[int], digest: str, seed: int | None, num_tokens: int) -> list[int]:
    """The whole answer."""
    key = echo_key(prompt, digest, seed)
    return [echo_token(key, i) for i in range(num_tokens)]


def echo_logprobs(token: int, num_top: int) -> TokenLogprobs:
    """Of a token, wherever it stands; the likeliest are it and the first others."""
    logprob = -(1 + token % 63) / 64  # exact in binary, so that it is the same after any journey
    others = [i for i in range(NUM_SPECIAL, NUM_SPECIAL + num_top) if i != token]
    return TokenLogprobs(logprob, [(token, logprob), *((i, -1.0 - i) for i in others)][:num_top])


def digest_of(source: str) -> str:
    """The made-up content of an adapter."""
    return hashlib.sha256(source.encode()).hexdigest()


def mix_digest(weighted: list[tuple[str, float]]) -> str:
    """The made-up content of a mix of adapters with these digests and weights, in any order."""
    return "+".join(f"{digest}*{weight}" for digest, weight in sorted(weighted))


def generations_of(command: Generate) -> list[int]:
    """The adapters that a command names."""
    return [member.generation for member in command.mix] or [command.generation]


@dataclass(eq=False)
class Running:
    """A sequence."""

    command: Generate
    key: bytes
    said: list[int]
    num_sent: int = 0


@dataclass(eq=False)
class Peer:
    """A gateway's session."""

    gateway: bytes
    sender: EventSender
    receiver: Receiver
    running: dict[int, Running] = field(default_factory=dict)
    last_heard_s: float = field(default_factory=time.monotonic)


class EchoWorker:
    """The whole worker: one loop over the sockets and one token a step for every sequence."""

    def __init__(
        self, endpoint: str, control: str | None, delay_ms: float, num_credits: int, adapters: list[str], tools: bool
    ) -> None:
        self.epoch = os.urandom(16)
        self.files = tiny_model.files(tiny_model.TOOL_TEMPLATE if tools else tiny_model.TEMPLATE)
        self.credits = num_credits
        self.delay_s = delay_ms / 1000
        self.created = int(time.time())
        self.peers: dict[bytes, Peer] = {}
        self.adapters: dict[int, AdapterInfo] = {}
        self.unloading: dict[int, tuple[bytes, int, float]] = {}  # generation → routing id, request id, deadline
        self.loading: list[tuple[bytes, LoadAdapter, float]] = []  # slow loads: routing id, command, when they end
        self.last_generation = 0
        self.failed: dict[str, AdapterEntry] = {}
        self.counts = {"aborts": 0, "generates": 0, "hellos": 0, "drop": 0, "gone": 0, "steps": 0}
        self.muted = False
        self.said: list[int] = []
        self.said_then: list[int] = []
        self.last_grammar: list[str] = []
        context = zmq.Context()
        self.router = context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.SNDHWM, 0)
        self.router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self.router.bind(endpoint)
        self.control = context.socket(zmq.REP)
        if control:
            self.control.bind(control)
        for spec in adapters:
            name, _, source = spec.partition("=")
            self._add(name, source or name, pinned=False)

    # -------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Until killed."""
        poller = zmq.Poller()
        poller.register(self.router, zmq.POLLIN)
        poller.register(self.control, zmq.POLLIN)
        next_beat = next_step = time.monotonic()
        while True:
            now = time.monotonic()
            busy = self.unloading or self.loading or any(peer.running for peer in self.peers.values())
            until = min(next_beat, next_step) if busy else next_beat
            events = dict(poller.poll(max(0, int((until - now) * 1000))))
            while self.router in events and self._receive():
                pass
            if self.control in events:
                self.control.send_json(self._do(self.control.recv_json()))
            now = time.monotonic()
            if now >= next_step:
                next_step = now + self.delay_s
                self._step()
            if now >= next_beat:
                next_beat = now + HEARTBEAT_INTERVAL_S
                self._beat(now)

    def _do(self, order: Any) -> Any:
        match order["do"]:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(order["seconds"])
            case "mute":
                self.muted = True
            case "drop":
                self.counts["drop"] += 1
            case "gone":
                self.counts["gone"] = order["times"]
            case "say":
                self.said, self.said_then = order["tokens"], order.get("then", [])
            case "delay":
                self.delay_s = order["ms"] / 1000
        running = sum(len(peer.running) for peer in self.peers.values())
        return {
            **self.counts,
            "running": running,
            "peers": len(self.peers),
            "pid": os.getpid(),
            "grammar": self.last_grammar,
        }

    def _receive(self) -> bool:
        try:
            routing_id, *frames = self.router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        try:
            if len(frames) != 1:
                raise ProtocolError("one frame is one message")
            self._take(routing_id, decode_command(frames[0]))
        except ProtocolError as error:
            peer = self.peers.pop(routing_id, None)
            session = peer.sender.session if peer else 0
            reject = Reject(reason=str(error), protocol_min=1, protocol_max=1)
            self._put(routing_id, EventSender(self.epoch, session).stamp(reject))
        return True

    def _put(self, routing_id: bytes, frame: bytes) -> None:
        try:
            self.router.send_multipart([routing_id, frame], zmq.NOBLOCK)
        except zmq.ZMQError:
            self.peers.pop(routing_id, None)

    def _send(self, routing_id: bytes, event: AnyEvent) -> None:
        if routing_id in self.peers:
            self._put(routing_id, self.peers[routing_id].sender.stamp(event))

    # -------------------------------------------------------------------------------------------------- commands

    def _take(self, routing_id: bytes, envelope: CommandEnvelope) -> None:
        command = envelope.body
        if isinstance(command, Hello):
            self._welcome(routing_id, envelope.session, command)
            return
        peer = self.peers.get(routing_id)
        if peer is None:
            raise ProtocolError("no session")
        peer.receiver.accept(envelope)
        peer.last_heard_s = time.monotonic()
        match command:
            case Generate():
                self._generate(routing_id, peer, command)
            case Abort():
                self.counts["aborts"] += peer.running.pop(command.request_id, None) is not None
            case LoadAdapter():
                self._load(routing_id, command)
            case ListAdapters():
                self._list(routing_id, command)
            case UnloadAdapter():
                self._unload(routing_id, command)
            case FetchFile():
                piece = self.files[command.name][command.offset : command.offset + FILE_CHUNK_BYTES]
                self._send(routing_id, FileChunk(request_id=command.request_id, data=piece))
            case Goodbye():
                del self.peers[routing_id]

    def _welcome(self, routing_id: bytes, session: int, hello: Hello) -> None:
        self.counts["hellos"] += 1
        self.peers = {key: peer for key, peer in self.peers.items() if peer.gateway != hello.gateway}
        sender = EventSender(self.epoch, session)
        self.peers[routing_id] = Peer(hello.gateway, sender, Receiver(self.epoch, session))
        model = ModelCard(
            names=[BASE, "alias"],
            digest="echo",
            created=self.created,
            vocab_size=tiny_model.VOCAB_SIZE,
            max_model_len=4096,
            eos_token_ids=[EOS],
            lora_enabled=True,
            adapter_resolver=True,
            prompt_logprobs=True,
            grammars=True,
        )
        files = [FileInfo(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in self.files.items()]
        event = Welcome(
            protocol=1,
            worker=self.epoch,
            model=model,
            files=files,
            adapters=list(self.adapters.values()),
            credits=self.credits,
            status=self._status(),
        )
        self._send(routing_id, event)

    def _generate(self, routing_id: bytes, peer: Peer, command: Generate) -> None:
        self.counts["generates"] += 1
        grammar = command.sampling.grammar
        self.last_grammar = [grammar.kind, grammar.source] if grammar else []
        if grammar is not None and "impossible" in grammar.source:
            error = Error(ErrorCode.INVALID_REQUEST, "The grammar cannot be used.", "grammar")
            output = Output(request_id=command.request_id, offset=0, token_ids=[], error=error)
            self._send(routing_id, Outputs(outputs=[output]))
            return
        digest = ""
        if command.generation or command.mix:
            if any(g not in self.adapters for g in generations_of(command)) or self.counts["gone"]:
                self.counts["gone"] = max(0, self.counts["gone"] - 1)
                error = Error(ErrorCode.ADAPTER_GONE, "The adapter was unloaded.", "model")
                output = Output(request_id=command.request_id, offset=0, token_ids=[], error=error)
                self._send(routing_id, Outputs(outputs=[output]))
                return
            if command.mix:
                digest = mix_digest([(self.adapters[m.generation].digest, m.weight) for m in command.mix])
            else:
                digest = self.adapters[command.generation].digest
        key = echo_key(command.prompt_token_ids, digest, command.sampling.seed)
        peer.running[command.request_id] = Running(command, key, self.said)
        if self.said_then:
            self.said, self.said_then = self.said_then, []

    def _load(self, routing_id: bytes, command: LoadAdapter, slow: bool = True) -> None:
        if slow and (command.source or command.name).startswith(("slow", "found-slow")):
            self.loading.append((routing_id, command, time.monotonic() + 0.3))
            return
        old = next((a for a in self.adapters.values() if a.name == command.name and a.state == "ready"), None)
        error = self._refuse(command, old)
        if error is not None:
            if error.code is ErrorCode.ADAPTER_INVALID and command.source is not None:
                self.failed[command.name] = AdapterEntry(name=command.name, source=command.source, error=error)
            self._send(routing_id, AdapterReply(request_id=command.request_id, error=error))
            return
        self.failed.pop(command.name, None)
        if old is not None and command.source is None:
            info = self.adapters[old.generation] = msgspec.structs.replace(old, pinned=bool(command.pinned))
        else:
            info = self._add(command.name, command.source or command.name, bool(command.pinned))
        self._tell(info)
        if old is not None and info.generation != old.generation:
            self._retire(old)
        self._send(routing_id, AdapterReply(request_id=command.request_id, adapter=info, usage=self._usage(info)))

    @staticmethod
    def _refuse(command: LoadAdapter, old: AdapterInfo | None) -> Error | None:
        if command.expected_generation is not None and command.expected_generation != (old.generation if old else 0):
            return Error(ErrorCode.ADAPTER_CONFLICT, "The generation is another.", "expected_generation")
        if command.source is None and old is None and not command.name.startswith("found"):
            return Error(ErrorCode.ADAPTER_NOT_FOUND, f"No adapter {command.name!r} is loaded.", "lora_name")
        if command.source == "missing":
            return Error(ErrorCode.ADAPTER_NOT_FOUND, "Nothing is found at the source.", "lora_path")
        if command.source in ("full", "away"):
            code = ErrorCode.STORE_FULL if command.source == "full" else ErrorCode.SOURCE_UNAVAILABLE
            return Error(code, "The load failed.", "lora_path")
        if (command.source or command.name).endswith("bad"):
            return Error(ErrorCode.ADAPTER_INVALID, "The adapter's key 'bias' is not supported.", "lora_path")
        if old is not None and not command.replace and command.source is not None:
            return Error(ErrorCode.ADAPTER_EXISTS, f"The adapter {command.name!r} is loaded already.", "lora_name")
        return None

    def _list(self, routing_id: bytes, command: ListAdapters) -> None:
        """Two generations a page, so that pages are read on."""
        found = [a for a in self.adapters.values() if a.generation > command.after]
        found = [a for a in found if command.name in (None, a.name)]
        entries = [AdapterEntry(name=a.name, source=a.source, info=a, usage=self._usage(a)) for a in found[:2]]
        if not command.after:
            loads = [AdapterEntry(name=load.name, source=load.source or "") for _, load, _ in self.loading]
            loads += self.failed.values()
            entries = [entry for entry in loads if command.name in (None, entry.name)] + entries
        memory = AdapterMemory(
            chunk_bytes=1000,
            chunks_total=100,
            chunks_free=100 - len(self.adapters),
            host_adapters=len(self.adapters),
            host_adapters_max=100,
            host_bytes=1000 * len(self.adapters),
            disk_bytes=1000 * len(self.adapters),
        )
        event = AdapterList(request_id=command.request_id, adapters=entries, more=len(found) > 2, memory=memory)
        self._send(routing_id, event)

    def _usage(self, info: AdapterInfo) -> AdapterUsage:
        held = 1000 if info.generation in self.adapters else 0
        return AdapterUsage(
            device_bytes=held,
            host_bytes=held,
            disk_bytes=held,
            num_unfinished=len([key for key in self._running() if key == info.generation]),
            num_requests=0,
            num_hits=0,
            num_misses=0,
            last_used=0,
        )

    def _running(self) -> list[int]:
        running = (r for peer in self.peers.values() for r in peer.running.values())
        return [generation for r in running for generation in generations_of(r.command)]

    def _unload(self, routing_id: bytes, command: UnloadAdapter) -> None:
        self.failed.pop(command.name, None)
        old = next((a for a in self.adapters.values() if a.name == command.name and a.state == "ready"), None)
        if old is None:
            ours = [load for load in self.loading if load[1].name == command.name]
            self.loading = [load for load in self.loading if load not in ours]
            for waiting, load, _ in ours:
                error = Error(ErrorCode.LOAD_CANCELLED, "The load was cancelled.", "lora_name")
                self._send(waiting, AdapterReply(request_id=load.request_id, error=error))
            error = Error(ErrorCode.ADAPTER_NOT_FOUND, f"No adapter {command.name!r} is loaded.", "lora_name")
            self._send(routing_id, AdapterReply(request_id=command.request_id, error=None if ours else error))
            return
        if command.expected_generation not in (None, old.generation):
            error = Error(ErrorCode.ADAPTER_CONFLICT, "The generation is another.", "expected_generation")
            self._send(routing_id, AdapterReply(request_id=command.request_id, error=error))
            return
        self._retire(old)  # told first, or a gateway would start the same again
        if command.force:
            self._fail(old.generation)
        deadline = time.monotonic() + command.timeout_ms / 1000
        self.unloading[old.generation] = (routing_id, command.request_id, deadline)

    def _add(self, name: str, source: str, pinned: bool) -> AdapterInfo:
        self.last_generation += 1
        info = AdapterInfo(
            name=name,
            generation=self.last_generation,
            digest=digest_of(source),
            state=AdapterState.READY,
            source=source,
            pinned=pinned,
            rank=8,
            modules=["q_proj"],
            num_bytes=1000,
            created=int(time.time()),
        )
        self.adapters[info.generation] = info
        return info

    def _fail(self, generation: int) -> None:
        error = Error(ErrorCode.ADAPTER_GONE, "The adapter was unloaded.", "model")
        for routing_id, peer in list(self.peers.items()):
            for request_id in [
                r for r, running in peer.running.items() if generation in generations_of(running.command)
            ]:
                offset = peer.running.pop(request_id).num_sent
                output = Output(request_id=request_id, offset=offset, token_ids=[], error=error)
                self._send(routing_id, Outputs(outputs=[output]))

    def _retire(self, info: AdapterInfo) -> None:
        self.adapters[info.generation] = msgspec.structs.replace(info, state=AdapterState.DRAINING)
        self._tell(self.adapters[info.generation])

    def _tell(self, info: AdapterInfo) -> None:
        for routing_id in list(self.peers):
            self._send(routing_id, AdapterChanged(adapter=info))

    # ------------------------------------------------------------------------------------------------------ steps

    def _step(self) -> None:
        self.counts["steps"] += 1
        for routing_id, peer in list(self.peers.items()):
            if not peer.running:
                continue
            event = Outputs(outputs=[self._next(peer, running) for running in list(peer.running.values())])
            if self.counts["drop"]:
                self.counts["drop"] -= 1
                peer.sender.stamp(event)  # counted, never sent
            else:
                self._send(routing_id, event)
        for load in [load for load in self.loading if load[2] <= time.monotonic()]:
            self.loading.remove(load)
            self._load(*load[:2], slow=False)
        used = self._running()
        for info in [a for a in self.adapters.values() if a.state is AdapterState.DRAINING]:
            routing_id, request_id, deadline = self.unloading.get(info.generation, (b"", 0, 0.0))
            if info.generation not in used or (routing_id and time.monotonic() >= deadline):
                if info.generation not in used:
                    del self.adapters[info.generation]
                    info = msgspec.structs.replace(info, state=AdapterState.REMOVED)
                self.unloading.pop(info.generation, None)
                self._send(routing_id, AdapterReply(request_id=request_id, adapter=info, usage=self._usage(info)))

    def _next(self, peer: Peer, running: Running) -> Output:
        command, offset = running.command, running.num_sent
        sampling = command.sampling
        token = echo_token(running.key, offset)
        if running.said:
            token = [*running.said, EOS][offset]
        running.num_sent += 1
        finish, stop_token = None, None
        if token == EOS or token in sampling.stop_token_ids and running.num_sent >= sampling.min_tokens:
            finish, stop_token = FinishReason.STOP, token
        elif running.num_sent >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            del peer.running[command.request_id]
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [echo_logprobs(token, sampling.logprobs)]
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None and offset == 0:
            prompt_logprobs = [echo_logprobs(t, sampling.prompt_logprobs) for t in command.prompt_token_ids[1:]]
        return Output(
            request_id=command.request_id,
            offset=offset,
            token_ids=[token],
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_token_id=stop_token,
            cached_tokens=1 if offset == 0 and len(command.prompt_token_ids) > 1 else 0,
        )

    def _beat(self, now: float) -> None:
        self.peers = {key: peer for key, peer in self.peers.items() if now - peer.last_heard_s < DEAD_AFTER_S}
        if self.muted:
            return
        for routing_id, peer in list(self.peers.items()):
            beat = WorkerHeartbeat(last_seq_seen=peer.receiver.last_seq, credits=self.credits, status=self._status())
            self._send(routing_id, beat)

    def _status(self) -> WorkerStatus:
        running = sum(len(peer.running) for peer in self.peers.values())
        return WorkerStatus(
            step_number=self.counts["steps"],
            step_age_ms=0,
            num_running=running,
            num_waiting=0,
            kv_blocks_total=100,
            kv_blocks_free=max(0, 100 - running),
            block_size=16,
            prompt_tokens_total=0,
            generation_tokens_total=0,
            preemptions_total=0,
            prefix_cache_queries_total=0,
            prefix_cache_hits_total=0,
            adapter_loads_total=len(self.adapters),
            adapter_uploads_total=0,
            running_adapters=sorted(a.name for a in self.adapters.values()),
            waiting_adapters=[],
            max_loras_per_batch=8,
        )


def main() -> None:
    """Parses the command line and runs; unknown options are errors, like the real worker's."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--control")
    parser.add_argument("--delay-ms", type=float, default=1.0)
    parser.add_argument("--credits", type=int, default=4096)
    parser.add_argument("--lora-paths", nargs="*", default=[])
    parser.add_argument("--tools", action="store_true", help="offer a chat template that knows tools")
    parser.add_argument("--log-level", help="as the real worker has it; nothing is logged here")
    options = parser.parse_args()
    adapters, tools = options.lora_paths, options.tools
    EchoWorker(options.endpoint, options.control, options.delay_ms, options.credits, adapters, tools).run()


if __name__ == "__main__":
    main()
