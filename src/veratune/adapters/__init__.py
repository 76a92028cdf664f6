"""Adapters on a model: find targets, and add, activate and merge adapters, without reading or writing files."""
