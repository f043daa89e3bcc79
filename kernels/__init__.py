"""Kernels: one op a file, each with its torch twin in reference.py."""
