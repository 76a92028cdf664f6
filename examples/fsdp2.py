"""Two processes with FSDP2 (`fully_shard`, gloo): parameters sharded, projections not, one whole adapter saved.

torchrun --nproc_per_node 2 examples/fsdp2.py
"""

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from _assets import check, fresh, quiet
from _topics import classifier, rows
from ddp import BATCH, STEPS, adapted, alone, batch_of, optimizer_for
from veratune import VeraModel, projection_pool


def main() -> None:
    quiet()
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        check(count == 2, "there are two processes")
        fresh("runs/examples/fsdp2")
    train, _, tokenizer = rows()
    model = adapted()
    for layer in model.base_model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_for(model)
    share = BATCH // count
    losses = []
    for step in range(STEPS):
        batch = batch_of(train, step, tokenizer)
        loss = model(**{name: rows[rank * share : (rank + 1) * share] for name, rows in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / count)
    model.save_pretrained("runs/examples/fsdp2", is_main_process=rank == 0)
    if rank == 0:
        expected = alone(train, tokenizer)
        print(f"  loss {losses[0]:.4f} -> {losses[-1]:.4f}; one process {expected[0]:.4f} -> {expected[-1]:.4f}")
        worst = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
        check(worst < 1e-3, f"the losses are those of one process (largest difference {worst:.1e})")
        whole = {(info.side, info.rank, info.width) for info in projection_pool.summary()}
        wanted = {(side, 64, width) for side in "AB" for width in (384, 1536)}
        check(whole == wanted, "each process holds whole projections")
        saved = VeraModel.from_pretrained(classifier(), "runs/examples/fsdp2")
        check(
            len(saved.adapter_state("default").vectors) == 37, "the adapter was saved whole, and loads in one process"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
