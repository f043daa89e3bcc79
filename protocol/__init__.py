"""The wire between gateway and worker: typed messages, their bounds, their order. Bytes in, messages out."""

# Raised when a message changes in a way an older peer cannot read. A peer states the range that it speaks in Hello.
PROTOCOL_VERSION = 1
PROTOCOL_MIN_VERSION = 1

HEARTBEAT_INTERVAL_S = 0.5
# Heartbeats missed before a peer gets no new work, and before it counts as dead.
SUSPECT_AFTER_S = 1.5
DEAD_AFTER_S = 3.0

# One ZeroMQ frame is one message. A prompt of 1M tokens packs to at most 5 MiB; a file chunk is 1 MiB.
MAX_FRAME_BYTES = 16 * 1024 * 1024
FILE_CHUNK_BYTES = 1024 * 1024
