import pytest

from trainers import NoHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> NoHub:
    """Stands in for the Hugging Face hub."""
    stand_in = NoHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: stand_in)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **_: stand_in)
    return stand_in
