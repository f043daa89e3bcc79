"""The worker: one model on its device, a scheduler, the adapters, a socket."""
