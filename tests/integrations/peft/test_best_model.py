"""transformers' plain Trainer with an adapter in PEFT that is not called "default"."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tiny_models import tiny_model
from veratune.integrations.peft import VeratuneConfig, install

install()


@pytest.mark.parametrize("others", [[], ["default"]])
@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.filterwarnings("ignore")
def test_the_best_step_is_loaded_not_the_last(name: str, others: list[str], tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False}
    model = peft.get_peft_model(tiny_model("llama"), VeratuneConfig(**config), adapter_name=name)
    for other in others:
        if other != name:
            model.add_adapter(other, VeratuneConfig(**config))
    values: list[dict[str, torch.Tensor]] = []
    scores = iter([1.0, 3.0, 2.0])

    class Trainer(transformers.Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            values.append(
                {
                    key: tensor.clone()
                    for key, tensor in peft.get_peft_model_state_dict(model, adapter_name=name).items()
                }
            )
            metrics = {"eval_score": next(scores, 0.0)}
            self.log(metrics)
            return metrics

    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(3)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        max_steps=3,
        learning_rate=0.1,
        report_to=[],
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows).train()
    best, last = values[1], values[2]
    now = peft.get_peft_model_state_dict(model, adapter_name=name)
    assert any(not torch.equal(best[key], last[key]) for key in best)
    assert all(torch.equal(now[key], best[key]) for key in best)
    assert model.active_adapters == [name]
