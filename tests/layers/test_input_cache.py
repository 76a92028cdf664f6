import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from reference import randomise
from small_net import small_inputs
from veratune import VeraConfig, get_peft_model
from veratune.layers.input_cache import InputCache
from veratune.ops.linear import project
from veratune.projections.structure import Matrix


class Attention(nn.Module):
    """Three layers that read one input, and one beside them that reads another."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))


def adapted(**settings):
    net = nn.Sequential(Attention(), Attention()).double()
    model = get_peft_model(net, VeraConfig(r=4, target_modules="all-linear", **settings))
    randomise(model)
    return model


@pytest.fixture
def products(monkeypatch):
    """The inputs of all products x A^T that are computed."""
    made = []

    def note(x, a_projection, *, exactly=False):
        made.append(tuple(x.shape))
        return project(x, a_projection, exactly=exactly)

    monkeypatch.setattr("veratune.layers.linear.project", note)
    return made


def test_one_product_for_all_that_read_one_input(products):
    model = adapted(route="factored")
    model(torch.randn(2, 5, 6, dtype=torch.float64))
    assert len(products) == 4  # q, k, v together and o, in each of two blocks


def test_the_result_is_that_of_products_of_their_own():
    model = adapted(route="factored")
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    shared = torch.autograd.grad(model(x).square().sum(), [x, *vectors])
    for layer in model.vera_layers().values():
        group = layer.entries["default"].group
        object.__setattr__(group, "cache", type("Never", (), {"get": lambda self, *call, **_: call[-1]()})())
    own = torch.autograd.grad(model(x).square().sum(), [x, *vectors])
    assert all(torch.equal(a, b) for a, b in zip(shared, own, strict=True))


def test_an_input_written_to_between_two_layers():
    model = adapted(route="factored")
    block = model.base_model[0]
    x = torch.randn(5, 6, dtype=torch.float64)
    block.q(x)
    x.mul_(2)
    assert torch.equal(block.k(x), block.k(x.clone()))


def test_the_same_layer_twice_on_one_tensor_computes_twice(products):
    """A write that torch does not count (through .data) must not be missed by a second pass."""
    model = adapted(route="factored")
    block = model.base_model[0]
    x = torch.randn(5, 6, dtype=torch.float64)
    block.q(x)
    x.data.mul_(2)
    assert torch.equal(block.q(x), block.q(x.clone()))
    assert len(products) == 3


def test_nothing_outlives_the_input():
    model = adapted(route="factored")
    memo = model.base_model[0].q.entries["default"].group.cache
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        model.base_model[0].q(x)
    assert memo._entry is not None
    del x
    gc.collect()
    assert memo._entry is None


def test_new_projections_get_a_new_product():
    model = adapted(route="factored")
    model.add_adapter("larger", VeraConfig(r=9, target_modules="all-linear", route="factored"))
    randomise(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    block = model.base_model[0]
    block.q(x)
    model.set_adapter("larger")
    model(x)  # draws more rows: the first adapter's views now are of another tensor
    model.set_adapter("default")
    assert torch.equal(block.k(x), block.k(x.clone()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model = adapted(route="factored")
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    expected = torch.autograd.grad(model(x).square().sum(), [x, *vectors])
    y = x
    for block in model.base_model:
        y = checkpoint(block, y, use_reentrant=reentrant)
    y.square().sum().backward()
    for tensor, grad in zip([x, *vectors], expected, strict=True):
        assert torch.equal(tensor.grad, grad)


def test_threads():
    model = adapted(route="factored")
    inputs = [torch.randn(5, 6, dtype=torch.float64) for _ in range(8)]
    expected = [model(x) for x in inputs]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(100) if not torch.equal(model(inputs[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_inference_mode():
    model = adapted(route="factored")
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x.clone()), expected)


def test_copies_have_memos_of_their_own():
    model = adapted(route="factored")
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        groups = [getattr(twin.base_model[0], name).entries["default"].group for name in "qkv"]
        assert groups[0] is groups[1] is groups[2]
        assert groups[0].cache is not model.base_model[0].q.entries["default"].group.cache
        assert groups[0].cache._entry is None
        assert torch.equal(twin(x), expected)


def test_a_memo_holds_one_product():
    memo = InputCache()
    a = Matrix(torch.randn(3, 6))
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    first = memo.get("q", x, a.values, lambda: project(x, a))
    assert memo.get("k", x, a.values, lambda: pytest.fail("computed again")) is first
    second = memo.get("q", y, a.values, lambda: project(y, a))
    assert second is not first
    assert memo.get("v", y, a.values, lambda: pytest.fail("computed again")) is second


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 8)


def test_a_parameter_as_input_is_not_remembered():
    """Fused optimizers write to a parameter without torch's counting it."""
    model = get_peft_model(TwoReaders().double(), VeraConfig(r=4, target_modules=["q", "k"], route="factored"))
    randomise(model)
    prompt = nn.Parameter(small_inputs(3))
    optimizer = torch.optim.AdamW([prompt], lr=0.1, fused=True)
    model.q(prompt).sum().backward()
    optimizer.step()
    assert torch.equal(model.k(prompt), model.k(prompt.detach().clone()))


def test_other_data_under_the_same_tensor():
    """Setting `data` leaves a tensor's version as it is."""
    model = adapted(route="factored")
    block = model.base_model[0]
    x = torch.randn(5, 6, dtype=torch.float64)
    block.q(x)
    x.data = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(block.k(x), block.k(x.clone()))


def test_training_after_a_part_ran_in_inference_mode():
    model = adapted(route="factored")
    block = model.base_model[0]
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.inference_mode():
        block.q(x)
    block.k(x).sum().backward()
    b, _ = block.k.vectors("default").values()
    assert b.grad is not None and b.grad.abs().sum() > 0


def test_a_product_of_another_stream_is_not_used(monkeypatch):
    cache, x, streams, made = InputCache(), torch.randn(2, 3), [1, 1, 2], []
    for layer, stream in zip(("q", "k", "v"), streams, strict=True):
        monkeypatch.setattr("veratune.layers.input_cache._stream", lambda x, stream=stream: stream)
        cache.get(layer, x, x, lambda layer=layer: made.append(layer) or torch.zeros(1))
    assert made == ["q", "v"]
