"""A pytest plug-in (`-p veratune_layers`): PEFT's own `VeraConfig` makes veratune's layers in all tests."""

from veratune.integrations.peft import install


def pytest_configure() -> None:
    install(replace_vera=True)
