"""sentence-transformers' trainer for a model that contains a `VeraModel`.

    model = SentenceTransformer("all-MiniLM-L6-v2")
    model[0].model = get_peft_model(model[0].model, VeraConfig(target_modules="all-linear"))
    VeraSentenceTransformerTrainer(model, ...).train()
    model[0].model.save_pretrained("my-adapter")

Checkpoints hold only the adapters, and training resumes from them, as with `VeraTrainer`.
"""

try:
    from sentence_transformers import SentenceTransformerTrainer
except ImportError as error:
    raise ImportError(
        "veratune.integrations.sentence_transformers needs sentence-transformers:"
        f" pip install 'veratune[sentence-transformers]' ({error})"
    ) from error

from veratune.integrations.trainer import VeraTrainerMixin


class VeraSentenceTransformerTrainer(VeraTrainerMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer` for a `SentenceTransformer` whose transformer is a `VeraModel`."""
