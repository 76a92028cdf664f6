"""Two processes with accelerate (DDP, gloo): the losses of one process, one small adapter saved.

accelerate launch --cpu --num_processes 2 examples/ddp.py      or      torchrun --nproc_per_node 2 examples/ddp.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from _assets import check, fresh, quiet
from _topics import Row, classifier, rows
from veratune import VeraConfig, VeraModel, get_peft_model, parameter_groups

STEPS, BATCH = 8, 16


def adapted() -> VeraModel:
    model = classifier()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what is dropped would differ between the processes
    return get_peft_model(model, VeraConfig(r=64, target_modules="all-linear"))


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=1e-2, head_lr=2e-3))


def alone(train: list[Row], tokenizer: object) -> list[float]:
    """Return the losses of one process with all rows."""
    model = adapted()
    optimizer = optimizer_for(model)
    losses = []
    for step in range(STEPS):
        loss = model(**batch_of(train, step, tokenizer)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batch_of(train: list[Row], step: int, tokenizer: object) -> dict[str, torch.Tensor]:
    return tokenizer.pad(
        train[step * BATCH : (step + 1) * BATCH], padding="max_length", max_length=32, return_tensors="pt"
    )


def main() -> None:
    quiet()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank, count = accelerator.process_index, accelerator.num_processes
    if accelerator.is_main_process:
        check(count == 2, "there are two processes")
        fresh("runs/examples/ddp")
    train, _, tokenizer = rows()
    model = adapted()
    trained, optimizer = accelerator.prepare(model, optimizer_for(model))
    share = BATCH // count
    losses = []
    for step in range(STEPS):
        batch = batch_of(train, step, tokenizer)
        own = {name: rows[rank * share : (rank + 1) * share].to(accelerator.device) for name, rows in batch.items()}
        loss = trained(**own).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach().reshape(1)).mean()))
    model.save_pretrained("runs/examples/ddp", is_main_process=accelerator.is_main_process)
    fingerprints = gather_object([model.projection_scheme("default").fingerprint()])
    if accelerator.is_main_process:
        expected = alone(train, tokenizer)
        print(f"  loss {losses[0]:.4f} -> {losses[-1]:.4f}; one process {expected[0]:.4f} -> {expected[-1]:.4f}")
        worst = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
        check(worst < 1e-3, f"the losses are those of one process (largest difference {worst:.1e})")
        check(len(set(fingerprints)) == 1, "both processes drew the same projections")
        saved = VeraModel.from_pretrained(classifier(), "runs/examples/ddp")
        pairs = zip(
            saved.adapter_state("default").parameters(), model.adapter_state("default").parameters(), strict=True
        )
        check(all(torch.equal(ours, theirs.cpu()) for ours, theirs in pairs), "the adapter was saved once, whole")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
