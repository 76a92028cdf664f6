"""Adapters on a model: finding targets, adding, activating and merging. No files."""
