"""sentence-transformers: MiniLM's embeddings taught that questions on the same topic are alike.

python examples/sentence_embeddings.py
"""

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

from _assets import check, fresh, minilm, questions, quiet
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups
from veratune.integrations.sentence_transformers import VeraSentenceTransformerTrainer

TOPICS = ("trivia", "coding", "ai", "literature", "psychology", "emotion")
HELD_OUT = 200
PAIRS = 480

Question = tuple[str, str, str]


def base() -> SentenceTransformer:
    return SentenceTransformer(str(minilm()), device=None if torch.cuda.is_available() else "cpu")


def pairs(rows: list[Question]) -> Dataset:
    """Return pairs of questions, half of them on the same topic (score 1), the others not (score 0)."""
    rng = np.random.default_rng(0)
    found: dict[str, list[object]] = {"sentence1": [], "sentence2": [], "score": []}
    while len(found["score"]) < PAIRS:
        (topic, one, _), (other, two, _) = (rows[i] for i in rng.integers(len(rows), size=2))
        score = float(topic == other)
        if found["score"].count(score) < PAIRS // 2:
            for name, value in zip(found, (one, two, score), strict=True):
                found[name].append(value)
    return Dataset.from_dict(found)


def told(model: SentenceTransformer, rows: list[Question]) -> float:
    """Return how often two questions on one topic are more alike than two on different ones (ROC area)."""
    embeddings = model.encode([question for _, question, _ in rows])
    topics = np.array([topic for topic, _, _ in rows])
    one, other = np.triu_indices(len(rows), 1)
    same = topics[one] == topics[other]
    ranks = (embeddings @ embeddings.T)[one, other].argsort().argsort() + 1
    count = int(same.sum())
    return float((ranks[same].sum() - count * (count + 1) / 2) / (count * (len(same) - count)))


def main() -> None:
    quiet()
    output = fresh("runs/examples/sentence-embeddings")
    rows = questions(*TOPICS)
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    model = base()
    before = told(model, held_out)
    model[0].model = get_peft_model(model[0].model, VeraConfig(r=64, target_modules="all-linear"))
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
        train_dataset=pairs(train),
        loss=CosineSimilarityLoss(model),
        optimizers=(torch.optim.AdamW(parameter_groups(model, lr=1e-2)), None),
    )
    trainer.train()
    after = told(model, held_out)
    print(f"  questions on one topic are the more alike ones: {before:.3f} -> {after:.3f}")
    check(after > before + 0.1, "topics of questions never seen are told better")

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
