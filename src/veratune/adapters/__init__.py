"""Adapters on a model: finding layers, installing, choosing and merging. No files."""
