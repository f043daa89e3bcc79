"""The models that the worker serves."""
