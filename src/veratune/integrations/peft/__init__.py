"""VeRA inside PEFT: `install()`, then `peft.get_peft_model(model, VeratuneConfig(...))`."""

from veratune.integrations.peft.tuner import VeratuneConfig, VeratuneTuner, install

__all__ = ["VeratuneConfig", "VeratuneTuner", "install"]
