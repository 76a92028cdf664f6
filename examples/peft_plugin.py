"""A script written for the peft package, unchanged but for the two lines that put veratune's layers into it.

python examples/peft_plugin.py
"""

import peft
import torch
from peft.tuners.vera import VeraLayer as PeftsOwnLayer
from torch.utils.data import DataLoader

from _assets import check, fresh, quiet
from _topics import accuracy, classifier, rows
from veratune.integrations.peft import install
from veratune.integrations.peft.layers import TunedLayer

OWN_TUNER = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.VERA]


def unchanged_script(output: str) -> torch.nn.Module:
    """Fine-tune with PEFT's VeRA. Nothing here knows of veratune."""
    train, held_out, tokenizer = rows()
    config = peft.VeraConfig(r=256, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(), config)
    model.print_trainable_parameters()
    head = [p for n, p in model.named_parameters() if p.requires_grad and "vera_lambda" not in n]
    vectors = [p for n, p in model.named_parameters() if "vera_lambda" in n]
    optimizer = torch.optim.AdamW([{"params": vectors, "lr": 2e-2}, {"params": head, "lr": 4e-3}])
    torch.manual_seed(0)
    loader = DataLoader(
        train, batch_size=16, shuffle=True, collate_fn=lambda part: tokenizer.pad(part, return_tensors="pt")
    )
    for _ in range(2):
        model.train()
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    print(f"  accuracy {accuracy(model, held_out, tokenizer):.3f}")
    model.save_pretrained(output)
    return model


def main() -> None:
    quiet()
    output = str(fresh("runs/examples/peft-plugin"))
    install(replace_vera=True)
    model = unchanged_script(output)
    _, held_out, tokenizer = rows()
    check(isinstance(model, peft.PeftModel), "the model is a peft.PeftModel")
    layers = [module for module in model.modules() if isinstance(module, TunedLayer)]
    check(len(layers) == 37, "its 37 linear layers are veratune's")
    check(accuracy(model, held_out, tokenizer) > 0.85, "more than 85 % of the held-out questions are told")

    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.VERA] = OWN_TUNER  # as where veratune is not installed
    theirs = peft.PeftModel.from_pretrained(classifier(), output).eval()
    check(any(isinstance(module, PeftsOwnLayer) for module in theirs.modules()), "PEFT's own layers read the file")
    batch = tokenizer.pad(held_out, return_tensors="pt")
    with torch.no_grad():
        ours, others = model.eval()(**batch).logits, theirs(**batch).logits
    difference = float((ours - others).abs().max())
    check(difference < 1e-3, f"and compute the same logits (largest difference {difference:.1e})")


if __name__ == "__main__":
    main()
