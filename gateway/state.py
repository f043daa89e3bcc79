"""Gateway: what the routes share: config, workers, metrics, and the threads for text."""

import asyncio
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request

from gateway.config import GatewayConfig
from gateway.errors import ApiError, from_worker, unavailable
from gateway.generation import Generation, Plan
from gateway.metrics import Metrics
from gateway.mixes import Adapter, scaled
from gateway.placement import Fleet, Lease
from gateway.registry import is_adapter_name, resolve_with_lora_path
from gateway.schemas import WeightedAdapter
from protocol.errors import ErrorCode

P = ParamSpec("P")
R = TypeVar("R")

_TEXT_THREADS = 2  # rendering and tokenizing; the tokenizer works outside the interpreter's lock


class Gateway:
    """One for each process."""

    def __init__(self, config: GatewayConfig, fleet: Fleet) -> None:
        self.config = config
        self.fleet = fleet
        self.metrics = Metrics()
        self.metrics.watch(fleet)
        self.draining = False
        self._kept: set[asyncio.Future[Any]] = set()
        self._threads = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="text")

    async def in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs slow text work off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    def resolve(
        self,
        model: str,
        lora_path: str | list[WeightedAdapter] | None = None,
        lora_scale: float | None = None,
        param: str = "lora_path",
    ) -> Adapter:
        """What a request names: an adapter, a mix, or None for the base model. Raises a 404, or a 503 without a worker.

        param: what errors about lora_path name.
        """
        card = self.fleet.require_model()
        adapter = resolve_with_lora_path(model, lora_path, card.names, self.fleet.adapters(), param)
        is_empty = adapter is None and isinstance(lora_path, list)  # a mix of weights 0, however it is scaled
        return adapter if lora_scale is None or is_empty else scaled(adapter, lora_scale)

    def admit(self, adapters: Collection[Adapter], num_sequences: int) -> Lease:
        """Reserves places for a request; count it before any expensive work is done for it."""
        return self.fleet.admit(adapters, num_sequences)

    def generate(self, lease: Lease, plan: Plan) -> Generation:
        """Starts a request's sequences."""
        return Generation(self.fleet, lease, plan, self.metrics)

    async def find_adapter(self, name: str, param: str | None) -> bool:
        """Has the workers' resolver load an adapter that is not; False if there is no such adapter or no resolver.

        Raises what is wrong with it, in terms of the request's param, or a 503 if it takes long; the load goes on then.
        """
        card = self.fleet.model
        if card is None or not card.adapter_resolver or name in card.names or not is_adapter_name(name):
            return False
        loading = asyncio.ensure_future(self.fleet.find(name))
        await asyncio.wait([loading], timeout=self.config.resolve_timeout_s)
        if not loading.done():
            self.keep(loading)
            raise unavailable(f"The adapter {name!r} is being loaded; try again shortly.")
        error = loading.result().error
        if error is not None and error.code is not ErrorCode.ADAPTER_NOT_FOUND:
            failure = from_worker(error)
            failure.param = param
            raise failure
        return error is None

    def keep(self, work: "asyncio.Future[Any]") -> None:
        """Holds on to work that nobody waits for."""
        self._kept.add(work)
        work.add_done_callback(self._kept.discard)
        work.add_done_callback(lambda work: work.cancelled() or work.exception())  # looked at: nobody else may

    async def close(self) -> None:
        """Ends the connections and the threads."""
        await self.fleet.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def gateway_of(request: Request) -> Gateway:
    """The process's Gateway."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def read_json(request: Request) -> bytes:
    """The body, which must be declared as JSON: what a web page can send without asking is not."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be application/json.", code="unsupported_media_type")
    body = await request.body()
    if not body:
        raise ApiError(400, "The body is empty; it must be a JSON object.")
    return body
