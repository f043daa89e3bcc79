"""The gateway: HTTP and text on one side, token ids and workers on the other. Never imports torch."""
