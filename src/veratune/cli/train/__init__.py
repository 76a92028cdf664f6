"""The command `veratune train`."""
