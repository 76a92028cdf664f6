"""Errors of the command line."""


class SettingsError(ValueError):
    """An invalid setting: wrong usage, regardless of the files' contents."""
