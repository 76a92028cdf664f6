"""transformers' `Trainer` with checkpoints that hold adapters alone.

The plain `Trainer` trains a `VeraModel` too, and resumes it, but writes the whole model into each checkpoint.
"""

import zipfile
from pathlib import Path
from typing import Any

try:
    import transformers
except ImportError as error:
    raise ImportError("veratune.integrations.trainer needs transformers: pip install 'veratune[hf]'") from error

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from veratune.adapters import notify
from veratune.checkpoint.files import CheckpointError, read_json
from veratune.model import VeraModel
from veratune.training import parameter_groups, why_rate_is_low


class VeraTrainer(transformers.Trainer):
    """A `transformers.Trainer` for a `VeraModel`.

    Its checkpoints hold the adapters, with what they train in full, as `save_pretrained` writes them, beside the state
    of the optimizer. `train(resume_from_checkpoint=...)` and `load_best_model_at_end` put their values into the
    adapters that the model has.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train`.

        Raises:
            ValueError: adapters are merged, and would not learn.
            CheckpointError: a file of the checkpoint to go on from is missing or damaged; nothing is changed then.
        """
        merged = self._vera_model().merged_adapters
        if merged:
            raise ValueError(f"the adapters {merged} are merged and would not learn: call unmerge_adapter() first")
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer where none was given; it says what VeRA wants."""
        parameter_groups(self._vera_model())  # tells of a model without anything to train
        low = why_rate_is_low(self.args.learning_rate)
        if self.optimizer is None and low is not None:
            notify(f"{low}: give it in the arguments, or an optimizer made with parameter_groups")
        return super().create_optimizer(*args, **kwargs)

    def _vera_model(self) -> VeraModel:
        """Return the model that is trained, or the one inside it that has the adapters."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        found = [module for module in model.modules() if isinstance(module, VeraModel)]
        if len(found) != 1:
            remedy = "use transformers.Trainer" if not found else f"it holds {len(found)} of them"
            raise TypeError(f"{type(self).__name__} trains a VeraModel, not a {type(model).__name__}: {remedy}")
        return found[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapters, once; all processes have to call this, as their parts are gathered (FSDP2)."""
        directory = Path(output_dir or self.args.output_dir or ".")
        self._vera_model().save_pretrained(directory, is_main_process=self.args.should_save)
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None and self.args.should_save:
            tokenizer.save_pretrained(directory)
        self.accelerator.wait_for_everyone()  # none may read it before it is there
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _check_files(Path(resume_from_checkpoint))
        self._vera_model().restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._vera_model().restore(best)


def _check_files(checkpoint: Path) -> None:
    """Raise CheckpointError for a file beside the adapters that cannot be read."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory, so there is no checkpoint to go on from")
    read_json(checkpoint / TRAINER_STATE_NAME)
    # torch writes zip archives with checksums, which tell of damage without anything being unpickled.
    for path in sorted({*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")}):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged: {error}: go on from an older checkpoint") from None
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged in {damaged}: go on from an older checkpoint")
