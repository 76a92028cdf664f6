"""veratune's layers inside the `peft` package, for code that needs a `peft.PeftModel`.

    from veratune.integrations.peft import VeratuneConfig, install

    install()  # once, before the first configuration is created or read
    model = peft.get_peft_model(model, VeratuneConfig(target_modules="all-linear"))

`PeftModel.from_pretrained`, transformers' `Trainer`, and other code for PEFT's models then work with this model. Files
are in veratune's format: `peft.PeftModel` and `veratune.VeraModel` write the same files, and each can read the other's.
"""

try:
    from veratune.integrations.peft.config import VeratuneConfig
    from veratune.integrations.peft.installation import install
    from veratune.integrations.peft.tuner import VeratuneTuner
except ImportError:
    from veratune.integrations.peft.method import check_version

    check_version()  # an unsupported version is the likely cause; this raises an error that names the supported ones
    raise

__all__ = ["VeratuneConfig", "VeratuneTuner", "install"]
