"""veratune's layers inside the `peft` package, for code that needs a `peft.PeftModel`.

    from veratune.integrations.peft import VeratuneConfig, install

    install()  # once, before the first configuration is made or read
    model = peft.get_peft_model(model, VeratuneConfig(target_modules="all-linear"))

`PeftModel.from_pretrained`, transformers' `Trainer`, and other code for PEFT's models then work with it. Files
are in veratune's format: `save_pretrained` of a `peft.PeftModel` and of a `veratune.VeraModel` write the same files,
and each can read those of the other.
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
