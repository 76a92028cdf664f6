import torch
from datasets import Dataset

from tiny_text import WORDS


def _sentence(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (5,), generator=generator).tolist())


def texts() -> Dataset:
    return Dataset.from_dict({"text": [_sentence(seed) for seed in range(12)]})
