"""transformers' `Trainer` with checkpoints that hold adapters alone.

The plain `Trainer` trains a `VeraModel` too, and resumes it, but writes the whole model into each checkpoint.
"""

from pathlib import Path
from typing import Any

try:
    import transformers
except ImportError as error:
    raise ImportError("veratune.integrations.trainer needs transformers: pip install 'veratune[hf]'") from error

from torch import nn

from veratune.adapters import notify
from veratune.model import VeraModel
from veratune.training import parameter_groups, why_rate_is_low


class VeraTrainer(transformers.Trainer):
    """A `transformers.Trainer` for a `VeraModel`.

    Its checkpoints hold the adapters, with what they train in full, as `save_pretrained` writes them, beside the state
    of the optimizer. `train(resume_from_checkpoint=...)` and `load_best_model_at_end` put their values into the
    adapters that the model has.
    """

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer where none was given; it says what VeRA wants."""
        parameter_groups(self._vera_model())  # tells of a model without anything to train
        low = why_rate_is_low(self.args.learning_rate)
        if self.optimizer is None and low is not None:
            notify(f"{low}: give it in the arguments, or an optimizer made with parameter_groups")
        return super().create_optimizer(*args, **kwargs)

    def _vera_model(self) -> VeraModel:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, VeraModel):
            raise TypeError(f"VeraTrainer trains a VeraModel, not a {type(model).__name__}: use transformers.Trainer")
        return model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir or ".")
        if not self.args.should_save:
            return
        self._vera_model().save_pretrained(directory)
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._vera_model().restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._vera_model().restore(best)
