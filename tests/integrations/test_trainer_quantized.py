"""Trainers on a model that transformers loaded quantized, with adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("bitsandbytes")
pytest.importorskip("trl")

from datasets import Dataset
from trl import SFTConfig

from tiny_models import TARGETS
from tiny_text import tiny_tokenizer
from trainers import arguments
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.integrations.trainer import VeraTrainer
from veratune.integrations.trl import VeraSFTTrainer

# Sides that bitsandbytes' products on a CPU take.
CONFIG = transformers.LlamaConfig(
    vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
)


@pytest.mark.parametrize("through", ["trainer", "trl"])
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:trl.*")
def test_trainers_take_a_quantized_model_with_adapters(through: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "base")

    def base() -> Any:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)

    model = get_peft_model(base(), VeraConfig(r=4, target_modules=TARGETS["llama"]))
    before = [vector.detach().clone() for vector in model.adapter_state("default").parameters()]
    rows = [{"input_ids": [3, 7, 8, 9, 10], "labels": [3, 7, 8, 9, 10]}] * 4
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 2}
    trainer: Any
    if through == "trainer":
        trainer = VeraTrainer(model, arguments(tmp_path / "run", **settings), train_dataset=Dataset.from_list(rows))
    else:
        shared = arguments(tmp_path / "run", **settings).to_dict()
        names = ("output_dir", "max_steps", "save_steps", "learning_rate", "report_to", "use_cpu", "seed")
        config = SFTConfig(**{name: shared[name] for name in names}, bf16=False)
        texts = Dataset.from_dict({"text": ["a b c yes", "d e f no"]})
        trainer = VeraSFTTrainer(model, config, train_dataset=texts, processing_class=tiny_tokenizer())
        for vector, old in zip(model.adapter_state("default").parameters(), before, strict=True):
            assert vector.dtype == old.dtype and torch.equal(vector, old)
    trainer.train()
    vectors = list(model.adapter_state("default").parameters())
    assert all(not torch.equal(vector, old) for vector, old in zip(vectors, before, strict=True))
    loaded = VeraModel.from_pretrained(base(), tmp_path / "run" / "checkpoint-2")
    ids = torch.tensor([[3, 7, 8, 9]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
