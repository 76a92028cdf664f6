"""Helpers for the other packages: files, torch internals, sharding, timing."""
