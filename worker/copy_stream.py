"""CopyStream: a CUDA stream of copies beside the stream of the steps, and the order between the two."""

from contextlib import AbstractContextManager

import torch


class CopyStream:
    """Memory changes hands at once in the host's books; what is enqueued here keeps to that order on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def wait_for_steps(self) -> None:
        """What is copied from now on comes behind all steps that are launched by now."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copying(self) -> AbstractContextManager[None]:
        """Copies enqueued within go this way."""
        return torch.cuda.stream(self._stream)

    def record(self) -> torch.cuda.Event:
        """An event behind all copies so far."""
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def hold_steps(self, event: torch.cuda.Event) -> None:
        """Steps that are launched from now on come behind the event."""
        torch.cuda.current_stream(self._device).wait_event(event)
