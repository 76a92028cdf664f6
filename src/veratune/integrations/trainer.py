"""transformers' `Trainer` with checkpoints that hold only the adapters.

    class MyTrainer(VeraTrainerMixin, Trainer): ...

The plain `Trainer` can also train a `VeraModel` and resume, but writes the complete model to each checkpoint.
"""

import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import transformers
except ImportError as error:
    raise ImportError("veratune.integrations.trainer needs transformers: pip install 'veratune[hf]'") from error

from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from veratune.checkpoint.files import CheckpointError, read_json, write_json
from veratune.model import VeraModel
from veratune.training import HEAD_RATE, VECTOR_RATE, rate_advice, trained_parts
from veratune.utils.outside_files import opened
from veratune.utils.text import notify

DIGESTS_NAME = "checkpoint_digests.json"
_LARGEST_STATE = 1 << 30


if TYPE_CHECKING:
    _TrainerAfterMixin = transformers.Trainer
else:
    _TrainerAfterMixin = object  # at run time, the subclass adds its trainer class


class VeraTrainerMixin(_TrainerAfterMixin):
    """Mixin for a subclass of `transformers.Trainer` that trains a `VeraModel`; it must be the first base class.

    Checkpoints hold the adapters and the modules that they train in full, as written by `save_pretrained`, and the
    optimizer state. `train(resume_from_checkpoint=...)` and `load_best_model_at_end` load these values into the model's
    existing adapters.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check that no trainer's methods override those of the mixin.

        Raises:
            TypeError: a trainer precedes the mixin in the base classes.
        """
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(VeraTrainerMixin)]:
            if issubclass(base, transformers.Trainer) and not issubclass(base, VeraTrainerMixin):
                raise TypeError(
                    f"{cls.__name__}: {base.__name__} precedes VeraTrainerMixin and would write the complete model to"
                    f" each checkpoint: write class {cls.__name__}(VeraTrainerMixin, {base.__name__})"
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the trainer, with the arguments of the trainer class.

        Raises:
            TypeError: the model is not a `VeraModel`.
        """
        super().__init__(*args, **kwargs)
        self._vera_model()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train` does.

        Raises:
            ValueError: adapters are merged and would not be trained.
            CheckpointError: a file of the checkpoint to resume from is missing or damaged; nothing is changed.
        """
        merged = self._vera_model().merged_adapters
        if merged:
            raise ValueError(f"the adapters {merged} are merged and would not be trained: call unmerge_adapter() first")
        if not self.is_deepspeed_enabled:
            return super().train(*args, **kwargs)
        with _frozen_may_be_missing(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer if none was given, with separate learning rates for the vectors and the rest.

        The vectors use the arguments' `learning_rate`, heads and biases a tenth of it. If it is transformers' default,
        which is meant for full fine-tuning, the defaults of `parameter_groups` are used instead, with a warning.
        Learning rates that the trainer class sets itself are kept.
        """
        vectors, rest = trained_parts(self._vera_model())  # raises an error if there is nothing to train
        if self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.learning_rate
        groups = [group for group in optimizer.param_groups if group.get("lr") == rate]
        if not groups:
            return optimizer
        if rate == type(self.args).__dataclass_fields__["learning_rate"].default:
            notify(
                f"learning_rate={rate} is the default of {type(self.args).__name__}, which is not suitable for VeRA:"
                f" the vectors are trained at {VECTOR_RATE:g} instead, heads and biases at {HEAD_RATE:g}. Set a"
                " different learning_rate, or pass an optimizer made with parameter_groups"
            )
            rate = VECTOR_RATE
        elif (advice := rate_advice(rate)) is not None and vectors:
            notify(f"{advice}; set a different learning_rate, or pass an optimizer made with parameter_groups")
        others = {id(parameter) for parameter in rest}
        _set_rates(optimizer, groups, others, rate, rate * HEAD_RATE / VECTOR_RATE)
        return optimizer

    def _vera_model(self) -> VeraModel:
        """Return the `VeraModel`: the trained model itself, or the one inside it."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        found = [module for module in model.modules() if isinstance(module, VeraModel)]
        if len(found) != 1:
            remedy = (
                "pass one, or use another trainer" if not found else f"it must contain one VeraModel, not {len(found)}"
            )
            raise TypeError(f"{type(self).__name__} trains a VeraModel, not a {type(model).__name__}: {remedy}")
        return found[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapters from one process. All processes must call this, because shards are gathered (FSDP2)."""
        _write(self, self._vera_model(), output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        _check_files(self, Path(resume_from_checkpoint))
        self._vera_model().restore(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # the engine holds shards of the parameters, and restores them itself
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        assert best is not None
        self._vera_model().restore(best)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        _write_digests(self, Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped
        # transformers does the same for PEFT's models. DeepSpeed keeps only one name of tied weights.
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        handle = engine.module.register_state_dict_post_hook(_leave_out_frozen)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del engine.save_checkpoint
            handle.remove()


class VeraTrainer(VeraTrainerMixin, transformers.Trainer):
    """A `transformers.Trainer` for a `VeraModel`."""


def _set_rates(optimizer: Any, groups: list[Any], others: set[int], rate: float, other_rate: float) -> None:
    """Set the learning rates of these groups; split a group that has both vectors and other parameters."""
    for group in groups:
        rest = [parameter for parameter in group["params"] if id(parameter) in others]
        vectors = [parameter for parameter in group["params"] if id(parameter) not in others]
        if rest and vectors:
            group["params"] = vectors
            optimizer.add_param_group({**group, "params": rest, "lr": other_rate})
        group["lr"] = rate if vectors else other_rate


def _write(trainer: Any, model: VeraModel, output_dir: str | None) -> None:
    """Write the adapters and the tokenizer from one process."""
    directory = Path(output_dir or trainer.args.output_dir or ".")
    model.save_pretrained(directory, is_main_process=trainer.args.should_save)
    tokenizer: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is not None and trainer.args.should_save:
        tokenizer.save_pretrained(directory)
    trainer.accelerator.wait_for_everyone()  # no process may read the files before they are written


def _frozen(model: nn.Module) -> set[str]:
    """Return the names of the frozen parameters, including every name of a shared one."""
    return {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}


def _leave_out_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in _frozen(module):
        state.pop(prefix + name, None)


@contextmanager
def _frozen_may_be_missing(model: nn.Module) -> Iterator[None]:
    """Make a model's `load_state_dict` accept a state dict without frozen parameters, such as DeepSpeed's."""

    def forgive(module: nn.Module, incompatible: Any) -> None:
        frozen = _frozen(module)
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]

    handle = model.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


def _write_digests(trainer: Any, checkpoint: Path) -> None:
    """Write the SHA-256 of the checkpoint's other files, which `_check_files` verifies before anything is restored."""
    if trainer.args.save_only_model or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return  # nothing to resume from, or files that an engine writes and checks itself
    trainer.accelerator.wait_for_everyone()  # each process writes the state of its random number generators
    if trainer.args.should_save and checkpoint.is_dir():
        write_json(checkpoint / DIGESTS_NAME, {path.name: _digest(path) for path in _states(checkpoint)})


def _states(checkpoint: Path) -> list[Path]:
    return sorted({*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")})


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with opened(path) as (file, _):
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _check_files(trainer: Any, checkpoint: Path) -> None:
    """Raise CheckpointError if a file of the checkpoint other than the adapters' is missing or damaged."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory, so there is no checkpoint to resume from")
    read_json(checkpoint / TRAINER_STATE_NAME, finite=False, largest=_LARGEST_STATE)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        _check_archives(checkpoint)
        return
    if os.path.lexists(checkpoint / DIGESTS_NAME):
        _check_digests(checkpoint)
        return
    # A checkpoint without digests, from an older version or another trainer.
    for name in (OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (checkpoint / name).is_file() and not (checkpoint / Path(name).with_suffix(".bin")).is_file():
            raise _missing(checkpoint / name)
    _check_archives(checkpoint)


def _check_digests(checkpoint: Path) -> None:
    for name, digest in read_json(checkpoint / DIGESTS_NAME).items():
        path = checkpoint / name
        if path.parent != checkpoint or not isinstance(digest, str):
            raise CheckpointError(f"{checkpoint / DIGESTS_NAME} is damaged: resume from an older checkpoint")
        if not path.exists():
            raise _missing(path)
        try:
            found = _digest(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Resume from an older checkpoint") from None
        if found != digest:
            raise CheckpointError(f"{path} is damaged: its SHA-256 does not match. Resume from an older checkpoint")


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not exist, and without it training would continue differently: resume from an older checkpoint"
    )


def _check_archives(checkpoint: Path) -> None:
    # torch writes zip archives with checksums, which reveal damage without unpickling anything.
    for path in _states(checkpoint):
        try:
            with opened(path) as (file, _), zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        # Reading a damaged archive can raise any of these.
        except (
            OSError,
            ValueError,
            RuntimeError,
            EOFError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise CheckpointError(f"{path} is damaged: {error}: resume from an older checkpoint") from None
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged in {damaged}: resume from an older checkpoint")
