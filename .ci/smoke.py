"""Check an installed veratune as its first user would: train, save, reload and compare, without the network.

By default, this checks that what `pip install veratune` brings is enough for a plain torch model; with `--cli`, that
`pip install 'veratune[cli]'` is enough for a BERT and the command line.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import nn

import veratune
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups

WORDS = ["good", "fine", "great", "bad", "poor", "awful"]
Inputs = dict[str, torch.Tensor]


def main() -> None:
    installed = Path(veratune.__file__).parent
    assert installed.parent == Path(sysconfig.get_path("purelib")), f"{installed} is not the installed wheel"
    assert version("veratune") == veratune.__version__
    assert (installed / "py.typed").is_file()
    readme = metadata("veratune").get_payload()
    links = re.findall(r'\]\(([^)]+)\)|(?:src|href|srcset)="([^"]+)"', readme)
    relative = [link for pair in links for link in pair if link and not link.startswith(("https://", "#"))]
    assert links and not relative, f"links that lead nowhere on the package index: {relative}"
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        check_plain_model()
        if "--cli" in sys.argv:
            check_bert()
            check_command_line()
    print(f"veratune {veratune.__version__} from {installed}: all checks passed")


def check_plain_model() -> None:
    """Adapt a model of two shapes, and reload the adapter into a new copy of it."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    config = VeraConfig(r=16, target_modules="all-linear")
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    check_adapter(base, config, {"input": x}, lambda output: output, (x.sum(dim=1) > 0).long())


def check_bert() -> None:
    """Do the same with a small random BERT."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    make_bert("bert")

    def base() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)
        return model

    ids = torch.randint(5, 11, (32, 6), generator=torch.Generator().manual_seed(1))
    config = VeraConfig(r=64, target_modules="all-linear")
    check_adapter(base, config, {"input_ids": ids}, lambda output: output.logits, (ids[:, 0] > 7).long())


def check_adapter(base: Any, config: VeraConfig, inputs: Inputs, logits: Any, labels: torch.Tensor) -> None:
    """Check that an adapter changes nothing when it is new, learns, and computes the same after it is reloaded."""
    plain = base().eval()
    with torch.no_grad():
        expected = logits(plain(**inputs))
    model = get_peft_model(base(), config).eval()
    with torch.no_grad():
        assert torch.equal(logits(model(**inputs)), expected), "a new adapter changes the outputs"
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-2, head_lr=4e-3))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(logits(model(**inputs)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    model.eval()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        model.save_pretrained(directory)
        reloaded = VeraModel.from_pretrained(base(), directory)
        with torch.inference_mode():
            difference = (logits(reloaded(**inputs)) - logits(model(**inputs))).abs().max()
        assert difference == 0, f"the reloaded adapter differs by {difference}"


def make_bert(directory: str) -> None:
    """Write a small random BERT with a tokenizer of a few words."""
    from transformers import BertConfig, BertModel, BertTokenizer

    Path(directory).mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    Path(directory, "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer.from_pretrained(directory).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes)).save_pretrained(directory)


def check_command_line() -> None:
    """Train on rows with the command line, and use what it wrote."""
    rows = [f"{word} {word},{'yes' if index < 3 else 'no'}" for index, word in enumerate(WORDS)] * 8
    Path("rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    veratune_("train", "--model", "bert", "--data", "rows.csv", "--output", "run")
    assert "good good,yes," in veratune_("predict", "run", "--data", "rows.csv")
    assert "query" in veratune_("inspect", "run")
    veratune_("merge", "run", "merged")
    veratune_("export", "run", "lora", "--format", "lora")
    assert Path("merged/model.safetensors").is_file() and Path("lora/adapter_config.json").is_file()
    assert veratune.__version__ in veratune_("--version")


def veratune_(*arguments: str) -> str:
    """Run the installed command, and return what it printed."""
    command = [str(Path(sys.executable).parent / "veratune"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
