"""What the demo checks on the adapter it saves: that it reloads to the same predictions, and how small its file is."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from _demo_data import Encoded, load_base_model
from _demo_training import predict
from veratune import VeraModel, get_peft_model


@dataclass(frozen=True)
class AdapterReport:
    """What was measured on a saved adapter.

    Attributes:
        directory: where the adapter is.
        test_rows: how many rows the trained and the reloaded model were compared on.
        same_predictions: how many of them the two put into the same class.
        largest_difference: between the two models' logits.
        file_bytes: size of the adapter's file, with the head.
        headless_bytes: size of the file of the same adapter without the head.
        peft_bytes: size of the file that PEFT writes by default for the same adaptation.
    """

    directory: Path
    test_rows: int
    same_predictions: int
    largest_difference: float
    file_bytes: int
    headless_bytes: int
    peft_bytes: int

    @property
    def reproduces(self) -> bool:
        """Whether the reloaded model computes exactly what the trained one does."""
        return self.largest_difference == 0 and self.same_predictions == self.test_rows


def check_adapter(
    model: VeraModel, trained_logits: Tensor, base_directory: Path, test: Encoded, directory: Path
) -> AdapterReport:
    """Save the trained adapter, load it into a fresh base model, compare the two, and measure the files."""
    model.save_pretrained(directory)
    # Another random head than any that was trained: the predictions can only be the same if the file's one is used.
    reloaded = VeraModel.from_pretrained(load_base_model(base_directory, seed=12345), directory)
    reloaded_logits = predict(reloaded, test)
    with tempfile.TemporaryDirectory() as scratch:
        headless, peft = Path(scratch, "headless"), Path(scratch, "peft")
        _without_head(model, base_directory).save_pretrained(headless)
        model.export_peft(peft, save_projection=True)
        return AdapterReport(
            directory=directory,
            test_rows=len(test),
            same_predictions=int((trained_logits.argmax(dim=1) == reloaded_logits.argmax(dim=1)).sum()),
            largest_difference=(trained_logits - reloaded_logits).abs().max().item(),
            file_bytes=weights_size(directory),
            headless_bytes=weights_size(headless),
            peft_bytes=weights_size(peft),
        )


def weights_size(directory: Path) -> int:
    """Return the size of the weights in a directory, without configuration and model card."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _without_head(model: VeraModel, base_directory: Path) -> VeraModel:
    """Return a copy of the trained adapter that has only the vectors."""
    config = model.peft_config[model.active_adapter]
    config = config.replace(modules_to_save=[], exclude_modules=config.modules_to_save)
    copy = get_peft_model(load_base_model(base_directory, seed=0), config)
    trained = model.adapter_state(model.active_adapter).vectors
    with torch.no_grad():
        for layer, vectors in copy.adapter_state(copy.active_adapter).vectors.items():
            for name, vector in vectors.items():
                vector.copy_(trained[layer][name])
    return copy
