"""Helpers for the other packages: files, text, tensors, torch internals, sharding, timing."""
