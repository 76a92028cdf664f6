"""The README's examples, run in its order as they are written, on a tiny model in place of the hub's."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tiny_models import tiny_inputs, tiny_model

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


class _Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = {name: tensor[0] for name, tensor in tiny_inputs("bert").items()}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.inputs, "labels": torch.tensor(index % 2)}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_examples_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str, **settings: object) -> nn.Module:
        assert (name, settings) == ("bert-base-uncased", {"num_labels": 2})
        return tiny_model("bert")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"dataset": _Rows()}
    assert len(BLOCKS) == 6
    first, several, made_of_one, trainer, bank, every_weight = BLOCKS
    for block in (first, several):
        exec(block, names)
    model = names["model"]
    assert sorted(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]
    names["model"].set_adapter("default")
    exec(made_of_one, names)
    assert not any("vera" in name for name, _ in names["merged"].named_parameters())
    assert {"for-peft", "for-lora-engines", "my-adapter"} <= {path.name for path in tmp_path.iterdir()}
    exec(first, names)
    names["batch"] = {name: tensor[[0, 0, 0]] for name, tensor in tiny_inputs("bert").items()}
    exec(bank, names)
    assert names["bank"].names() == ["carla", "anna"] and names["logits"].shape[0] == 3
    names["bank"].unload()
    exec(every_weight, names)
    names["model"] = names["get_peft_model"](tiny_model("bert"), names["VeraConfig"](target_modules="all-linear"))
    exec(trainer, names)
    names["trainer"].train()
    vectors = names["model"].adapter_state("default").vectors.values()
    assert all(bool((own["b"] != 0).any()) for own in vectors)
