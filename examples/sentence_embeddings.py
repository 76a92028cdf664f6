"""sentence-transformers: MiniLM's embeddings taught to find the answer to a question.

python examples/sentence_embeddings.py
"""

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from _assets import check, fresh, minilm, questions, quiet
from veratune import VeRAConfig, VeraModel, get_peft_model, parameter_groups
from veratune.integrations.sentence_transformers import VeraSentenceTransformerTrainer

TOPICS = ("trivia", "coding", "ai", "literature", "science", "psychology", "money", "history")
HELD_OUT = 150


def base() -> SentenceTransformer:
    return SentenceTransformer(str(minilm()), device=None if torch.cuda.is_available() else "cpu")


def found(model: SentenceTransformer, pairs: list[tuple[str, str, str]]) -> float:
    """Return the mean reciprocal rank of each question's answer among all answers."""
    asked = model.encode([question for _, question, _ in pairs])
    answers = model.encode([answer for _, _, answer in pairs])
    scores = asked @ answers.T
    return float(np.mean(1.0 / (scores >= np.diag(scores)[:, None]).sum(1)))


def main() -> None:
    quiet()
    output = fresh("runs/examples/sentence-embeddings")
    pairs = questions(*TOPICS)
    held_out, train = pairs[:HELD_OUT], pairs[HELD_OUT:]
    model = base()
    before = found(model, held_out)
    model[0].model = get_peft_model(model[0].model, VeRAConfig(r=256, target_modules="all-linear"))
    trainer = VeraSentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(output / "checkpoints"),
            num_train_epochs=2,
            per_device_train_batch_size=32,
            save_strategy="epoch",
            logging_steps=5,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": [q for _, q, _ in train], "positive": [a for _, _, a in train]}),
        loss=MultipleNegativesRankingLoss(model),
        optimizers=(torch.optim.AdamW(parameter_groups(model, lr=5e-3)), None),
    )
    trainer.train()
    after = found(model, held_out)
    print(f"  mean reciprocal rank of the right answer {before:.3f} -> {after:.3f}")
    check(after > before + 0.01, "answers to questions never seen are found better")

    model[0].model.save_pretrained(output / "adapter")
    texts = [question for _, question, _ in held_out]
    embeddings = model.encode(texts)
    again = base()
    again[0].model = VeraModel.from_pretrained(again[0].model, output / "adapter")
    check(bool((again.encode(texts) == embeddings).all()), "the adapter on a fresh model gives the same embeddings")

    model[0].model = model[0].model.merge_and_unload()
    model.save(str(output / "merged"))
    plain = SentenceTransformer(str(output / "merged"), device=str(model.device))
    difference = float(np.abs(plain.encode(texts) - embeddings).max())
    check(difference < 1e-5, f"so does the merged model without veratune (largest difference {difference:.1e})")


if __name__ == "__main__":
    main()
