"""The demo adapters: how they are made, and that they are what they say."""
