"""Serve the text classifiers of 1,000 customers on one MiniLM, mixed in every batch, and check every answer.

    python examples/many_customers.py

Three adapters are really trained, each on a task of its own on film reviews. A thousand customers are made of them: the
first three have the trained ones, every other has one of the three with all vectors and the head moved by random
numbers (5 % of each). They stand for a thousand trainings in memory and time, and no two of them compute the same, so
that an answer with another customer's adapter is found out; they do not show how well a thousand tasks are learned.

All adapters are put into one bank file. A server opens it, holds 256 of them at a time on the device, and answers
requests in mixed batches. Each answer is compared with that of a model that has this one customer's adapter alone. The
exit code is 1 if any is wrong.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
try:
    import pandas as pd
    import torch
    from torch import Tensor
    from transformers import AutoTokenizer

    from _demo_data import DemoError, Encoded, load_base_model, model_directory, quieten_transformers, read_reviews
    from veratune import AdapterBank, BankError, VeraConfig, VeraModel, get_peft_model, parameter_groups
except ModuleNotFoundError as missing:
    sys.exit(f"many_customers: the package {missing.name!r} is missing: pip install -e '.[demo]'")

RANK = 64
MAX_TOKENS = 32
TRAIN_BATCH = 16
TEST_ROWS = 300
SERVED_BATCH = 32
CAPACITY = 256
MOVED = 0.05
# Both sides compute the same sums in float32, in another order and with other padding.
TOLERANCE = 2e-4

Vectors = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A question about a text, with rows to learn and rows to test the answer on."""

    name: str
    train: Encoded
    test: Encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=1000, help="default: 1000")
    parser.add_argument("--steps", type=int, default=60, help="training steps for each of the three (default: 60)")
    options = parser.parse_args()
    if options.customers < 3 or options.steps < 1:
        parser.error("--customers is at least 3, --steps at least 1")
    quieten_transformers()
    try:
        directory = model_directory()
        tasks = make_tasks(directory, options.steps)
    except DemoError as error:
        sys.exit(f"many_customers: {error}")
    with tempfile.TemporaryDirectory() as scratch:
        problems = run(directory, tasks, options.customers, options.steps, Path(scratch, "customers.bank"))
    if problems:
        sys.exit("\n".join(f"many_customers: {problem}" for problem in problems))


def run(directory: Path, tasks: list[Task], customers: int, steps: int, file: Path) -> list[str]:
    """Train, build the file, serve and check; return what was wrong."""
    trained = [train(directory, task, steps) for task in tasks]
    names = [f"customer-{number:04}" for number in range(customers)]

    started = time.perf_counter()
    config = VeraConfig(r=RANK, target_modules="all-linear", modules_to_save=["classifier"])
    alone = get_peft_model(load_base_model(directory, seed=0), config).eval()
    with_bank = AdapterBank(load_base_model(directory, seed=0), config, file=file)
    for number, name in enumerate(names):
        become(alone, trained, number)
        with_bank.add(name, alone)
    with_bank.unload()
    seconds = time.perf_counter() - started
    print(f"{customers:,} adapters put into a bank file in {seconds:.1f} s")

    plain = load_base_model(directory, seed=0).eval()
    started = time.perf_counter()
    bank = AdapterBank.open(load_base_model(directory, seed=0), file, capacity=CAPACITY)
    print(f"  opened in {time.perf_counter() - started:.2f} s: {len(bank):,} names")
    in_memory = bank.layout.numbers * bank.dtype.itemsize + bank.layout.saved_numbers * 4
    in_file = file.stat().st_size / customers
    print(f"  a customer takes {in_memory / 1000:.1f} KB in memory and {in_file / 1000:.1f} KB in the file;")
    print(f"  the model is {sum(p.numel() * p.element_size() for p in plain.parameters()) / 1e6:.1f} MB, once")

    requests = make_requests(customers, tasks)
    answers, expected_base, mixed_seconds, plain_seconds = serve(bank, plain, requests, tasks, names)
    rate, plain_rate = len(requests) / mixed_seconds, len(requests) / plain_seconds
    print(f"{len(requests):,} requests in mixed batches of {SERVED_BATCH}, about {SERVED_BATCH} customers in each:")
    print(
        f"  {rate:.0f} a second; the plain model on the same batches: {plain_rate:.0f} ({rate / plain_rate:.2f} of it)"
    )
    problems = check_answers(alone, trained, requests, tasks, answers, expected_base)
    problems += check_changes(bank, alone, trained, tasks, names)
    if not problems:
        print("No answer was wrong.")
    return problems


# Three tasks and three adapters


def make_tasks(directory: Path, steps: int) -> list[Task]:
    """Return three questions about film reviews."""
    reviews = read_reviews().drop_duplicates("text").sample(frac=1.0, random_state=0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    short = reviews[reviews["source"] == "rotten_tomatoes"]
    words = short["text"].str.split().str.len()
    questions = {
        "favourable or not": (short, short["label"]),
        "a critic's sentence or a spectator's review": (reviews, (reviews["source"] == "imdb").astype(int)),
        "longer than 20 words or not": (short, (words > 20).astype(int)),
    }
    rows = TRAIN_BATCH * steps
    tasks = []
    for name, (texts, labels) in questions.items():
        test = encode(tokenizer, texts["text"][:TEST_ROWS], labels[:TEST_ROWS])
        learned = slice(TEST_ROWS, TEST_ROWS + rows)
        tasks.append(Task(name, encode(tokenizer, texts["text"][learned], labels[learned]), test))
    return tasks


def encode(tokenizer: AutoTokenizer, texts: pd.Series, labels: pd.Series) -> Encoded:
    ids = tokenizer([str(text) for text in texts], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return Encoded(tokenizer, ids, [int(label) for label in labels])


def train(directory: Path, task: Task, steps: int) -> Vectors:
    """Train an adapter for some seconds; return its vectors and head by name."""
    started = time.perf_counter()
    config = VeraConfig(r=RANK, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(load_base_model(directory, seed=0), config)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-2, head_lr=4e-3))
    model.train()
    for step in range(steps):
        first = step * TRAIN_BATCH % max(1, len(task.train) - TRAIN_BATCH + 1)
        loss = model(**task.train.batch(range(first, first + TRAIN_BATCH))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
            for batch in (task.test.batch(range(i, i + 50)) for i in range(0, TEST_ROWS, 50))
        )
    commonest = max(task.test.labels.count(label) for label in (0, 1))
    print(
        f"trained {task.name!r} in {time.perf_counter() - started:.0f} s: {100 * right / TEST_ROWS:.0f} % of"
        f" {TEST_ROWS} test rows (always the same answer: {100 * commonest / TEST_ROWS:.0f} %)"
    )
    return {name: tensor.detach().clone() for name, tensor in numbers_of(model)}


def numbers_of(model: VeraModel) -> Iterator[tuple[str, Tensor]]:
    """Return all that an adapter consists of: vectors and the head."""
    state = model.adapter_state(model.active_adapter)
    for layer, vectors in state.vectors.items():
        for name, vector in vectors.items():
            yield f"{layer}.{name}", vector
    for module, saved in state.saved.items():
        for name, parameter in saved.items():
            yield f"{module}.{name}", parameter


def become(model: VeraModel, trained: list[Vectors], customer: int) -> None:
    """Give a model the adapter of one customer, the same at every call."""
    values = trained[customer % len(trained)]
    generator = torch.Generator().manual_seed(customer)
    with torch.no_grad():
        for name, own in numbers_of(model):
            noise = torch.randn(own.shape, generator=generator)
            own.copy_(values[name] if customer < len(trained) else values[name] * (1 + MOVED * noise))


# Requests and answers


def make_requests(customers: int, tasks: list[Task]) -> list[tuple[int, int]]:
    """Return (customer, row of the test texts of the customer's task), two of each customer, in random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(2 * customers, generator=generator).tolist()
    return [(number % customers, number // len(tasks) % TEST_ROWS) for number in order]


def batch_of(rows: list[tuple[int, int]], tasks: list[Task]) -> dict[str, Tensor]:
    tokens = [tasks[customer % len(tasks)].test.token_ids[row] for customer, row in rows]
    return dict(tasks[0].test.tokenizer.pad({"input_ids": tokens}, return_tensors="pt"))


def serve(
    bank: AdapterBank, plain: torch.nn.Module, requests: list[tuple[int, int]], tasks: list[Task], names: list[str]
) -> tuple[Tensor, Tensor, float, float]:
    """Return the logits of all requests, those of the plain model, and the seconds of both, batch by batch in turns."""
    found, base, mixed_seconds, plain_seconds = [], [], 0.0, 0.0
    with torch.no_grad():  # in which query, key and value share a product, unlike in inference_mode
        for start in range(0, len(requests), SERVED_BATCH):
            rows = requests[start : start + SERVED_BATCH]
            batch = batch_of(rows, tasks)
            began = time.perf_counter()
            found.append(bank.model(**batch, adapters=[names[customer] for customer, _ in rows]).logits)
            between = time.perf_counter()
            base.append(plain(**batch).logits)
            plain_seconds += time.perf_counter() - between
            mixed_seconds += between - began
    return torch.cat(found), torch.cat(base), mixed_seconds, plain_seconds


def check_answers(
    alone: VeraModel,
    trained: list[Vectors],
    requests: list[tuple[int, int]],
    tasks: list[Task],
    answers: Tensor,
    base: Tensor,
) -> list[str]:
    """Compare each answer with that of the customer's adapter alone; return what is wrong."""
    by_customer: dict[int, list[int]] = {}
    for position, (customer, _) in enumerate(requests):
        by_customer.setdefault(customer, []).append(position)
    largest, nearest, wrong = 0.0, float("inf"), []
    for customer, positions in by_customer.items():
        become(alone, trained, customer)
        with torch.inference_mode():
            expected = alone(**batch_of([requests[p] for p in positions], tasks)).logits
            become(alone, trained, customer + len(trained))  # of another customer with the same task
            neighbour = alone(**batch_of([requests[p] for p in positions], tasks)).logits
        apart = float((answers[positions] - expected).abs().max())
        largest = max(largest, apart)
        nearest = min(nearest, float((neighbour - expected).abs().amax(dim=1).min()))
        if not apart <= TOLERANCE:
            wrong.append(f"customer {customer} was answered {apart:.3g} away from what its own adapter says")
    print(f"  largest difference from each customer's adapter alone: {largest:.1e} (allowed: {TOLERANCE:.0e})")
    print(f"  differences that a neighbour's adapter would make: {nearest:.1e} and more")
    moved = float((answers - base).abs().amax(dim=1).min())
    print(f"  differences that the plain model would make: {moved:.1e} and more")
    if len(answers) != len(requests):
        wrong.append(f"{len(requests)} requests got {len(answers)} answers")
    if not moved > 0:
        wrong.append("a customer was answered by the plain model")
    return wrong


def check_changes(
    bank: AdapterBank, alone: VeraModel, trained: list[Vectors], tasks: list[Task], names: list[str]
) -> list[str]:
    """Replace and remove an adapter while the bank is open; return what is wrong."""
    problems = []
    rows = [(0, 0), (0, 0), (0, 0)]
    batch = batch_of(rows, tasks)
    become(alone, trained, len(names))  # nobody's yet
    with torch.inference_mode():
        expected = alone(**batch).logits
        began = time.perf_counter()
        bank.add(names[0], alone, replace=True)
        took = time.perf_counter() - began
        found = bank.model(**batch, adapters=[names[0], names[1], None]).logits
        become(alone, trained, 1)
        other = alone(**batch).logits
    print(f"  an adapter was replaced, in the file as well, in {1000 * took:.1f} ms")
    if not float((found[0] - expected[0]).abs().max()) <= TOLERANCE:
        problems.append("a replaced adapter was not used")
    if not float((found[1] - other[1]).abs().max()) <= TOLERANCE:
        problems.append("replacing an adapter changed another")
    bank.remove(names[2])
    try:
        bank.model(**batch, adapters=[names[2], None, None])
    except BankError:
        return problems
    return [*problems, "a removed adapter was served"]


if __name__ == "__main__":
    main()
