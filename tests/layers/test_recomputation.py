"""Gradient checkpointing: what is computed again is computed as in its own forward pass, or refused."""

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiny_models import tiny_model
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.layers.recomputation import State, StateLog

REFUSED = "is recomputed in a backward pass .*, but with different adapters"
reentrant_or_not = pytest.mark.parametrize("reentrant", [True, False])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(2, *x.shape[-2:]), self.up_proj.mT).sum(0)


class Net(nn.Module):
    """A layer of each kind in one block, which is checkpointed; its weight is also read without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 6)
        self.read = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.experts = Experts()
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)
        self.only: str | None = None
        self.reentrant: bool | None = None

    def block(self, x: Tensor, ids: Tensor) -> Tensor:
        steps: dict[str, Callable[[Tensor], Tensor]] = {
            "embed": lambda x: x + self.embed(ids),
            "linear": self.linear,
            "read": lambda x: torch.tanh(x @ self.read.weight.t()),
            "conv": lambda x: self.conv(x.t().unsqueeze(0)).squeeze(0).t(),
            "experts": self.experts,
            "norm": self.norm,
            "head": self.head,
        }
        for name, step in steps.items():
            if self.only in (None, name):
                x = step(x)
        return x

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.block(x, ids)
        result: Tensor = checkpoint(self.block, x, ids, use_reentrant=self.reentrant)
        return result


LAYERS = ("embed", "linear", "read", "conv", "experts")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
ONES = torch.tensor([1, 2, 3, 4, 1])
CONFIG = VeraConfig(
    r=3,
    target_modules=["embed", "linear", "read", "conv"],
    target_parameters=["experts.up_proj"],
    modules_to_save=["head"],
    bias="all",
)


def fill(model: nn.Module, scale: float = 0.4) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name or "modules_to_save" in name or "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def net(reentrant: bool | None, only: str | None = None, bias: str = "all") -> VeraModel:
    torch.manual_seed(0)
    model = get_peft_model(Net(), CONFIG.replace(bias=bias), adapter_name="a")
    model.add_adapter("b", CONFIG.replace(projection_prng_key=3, bias=bias))
    fill(model)
    model.base_model.reentrant, model.base_model.only = reentrant, only
    return model


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(X.clone().requires_grad_(), ONES).square().sum()
    return loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


CHANGES: dict[str, Callable[[VeraModel], None]] = {
    "another": lambda model: model.set_adapter("b"),
    "none": lambda model: model.set_adapter([]),
    "merged": lambda model: model.merge_adapter(),
    "deleted": lambda model: model.delete_adapter("a"),
}


@reentrant_or_not
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_of_each_kind_refuses_to_be_computed_otherwise(reentrant: bool, change: str, layer: str) -> None:
    model = net(reentrant, layer, "none")  # biases have checks of their own
    loss = loss_of(model)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    assert not gradients(model)


@reentrant_or_not
@pytest.mark.parametrize("layer", ["norm", "head"])
def test_biases_and_modules_trained_in_full_do_too(reentrant: bool, layer: str) -> None:
    model = net(reentrant, layer)
    loss = loss_of(model)
    model.set_adapter("b")
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    assert not gradients(model)


@reentrant_or_not
def test_adapters_disabled_in_the_backward_pass_are_refused(reentrant: bool) -> None:
    model = net(reentrant)
    loss = loss_of(model)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="then 'a', now no adapter"):
        loss.backward()


@reentrant_or_not
def test_so_is_a_merged_model_that_was_unmerged(reentrant: bool) -> None:
    model = net(reentrant, "linear")
    model.merge_adapter()
    loss = loss_of(model)
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match=r"then 'a' \(merged\), now 'a'"):
        loss.backward()


@reentrant_or_not
def test_an_adapter_of_the_same_name_is_another_one(reentrant: bool) -> None:
    model = net(reentrant, "linear", "none")
    loss = loss_of(model)
    model.delete_adapter("a")
    model.add_adapter("a", copy.deepcopy(CONFIG))
    model.set_adapter("a")
    with pytest.raises(RuntimeError, match="then an adapter since removed, now 'a'"):
        loss.backward()


@reentrant_or_not
def test_what_is_put_back_before_the_backward_pass_gives_the_gradients_of_no_checkpointing(reentrant: bool) -> None:
    def step(model: VeraModel) -> dict[str, Tensor]:
        for _ in range(2):
            loss = loss_of(model)
            with torch.no_grad(), model.disable_adapter():  # as for DPO's reference
                loss_of(model)
            with torch.no_grad(), model.only(["b"]):
                loss_of(model)
            model.merge_adapter()
            model.unmerge_adapter()
            loss.backward()
        return gradients(model)

    expected, actual = step(net(None)), step(net(reentrant))
    assert expected.keys() == actual.keys() and len(expected) > 12
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@reentrant_or_not
def test_passes_with_different_adapters_each_with_its_backward_pass_give_the_same_as_well(reentrant: bool) -> None:
    def step(model: VeraModel) -> dict[str, Tensor]:
        loss_of(model).backward()
        model.set_adapter("b")
        loss_of(model).backward()
        return gradients(model)

    expected, actual = step(net(None)), step(net(reentrant))
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@reentrant_or_not
def test_of_two_pending_passes_the_right_one_is_refused(reentrant: bool) -> None:
    model = net(reentrant, "linear")
    first = loss_of(model)
    model.set_adapter("b")
    second = loss_of(model)
    second.backward()
    b = model.vera_layers()["linear"].vectors("b")["b"]
    assert b.grad is not None and b.grad.any()
    with pytest.raises(RuntimeError, match="then 'a', now 'b'"):
        first.backward()


@reentrant_or_not
def test_an_adapter_added_to_a_model_with_a_pending_pass_is_noticed(reentrant: bool) -> None:
    torch.manual_seed(0)
    base = Net()
    base.reentrant = reentrant
    loss = loss_of(base)
    get_peft_model(base, copy.deepcopy(CONFIG))
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


@reentrant_or_not
def test_layers_notice_that_another_has_lost_its_adapter(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), VeraConfig(r=3, target_modules=["linear"]), adapter_name="a")
    model.add_adapter("b", VeraConfig(r=3, target_modules=["conv"], modules_to_save=["head"]))
    fill(model)
    model.set_adapter(["a", "b"])
    model.base_model.reentrant = reentrant
    loss = loss_of(model)
    model.set_adapter(["b"])
    model.delete_adapter("a")
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    assert not gradients(model)
    model.add_adapter("c", VeraConfig(r=3, target_modules=["linear"]))
    loss = loss_of(model)
    model.delete_adapter("c")  # which has never computed
    loss.backward()
    assert len(gradients(model)) == 4


def remove_each(model: VeraModel) -> None:
    for name in ("b", "a"):
        if name in model.peft_config:
            model.delete_adapter(name)


REMOVALS: dict[str, Callable[[VeraModel], Any]] = {
    "unload": VeraModel.unload,
    "merge_and_unload": VeraModel.merge_and_unload,
    "delete_adapter": remove_each,
}


@reentrant_or_not
@pytest.mark.parametrize(
    ("layer", "removal"),
    [
        *((layer, "unload") for layer in (*LAYERS, "norm", "head", None)),
        *((layer, removal) for layer in ("linear", "head") for removal in ("merge_and_unload", "delete_adapter")),
    ],
)
def test_a_model_without_its_last_adapters_notices_it(reentrant: bool, removal: str, layer: str | None) -> None:
    model = net(reentrant, layer)
    loss = loss_of(model)
    base = model.base_model
    if layer in ("read", None):  # what is read without a call cannot notice anything
        with pytest.raises(ValueError, match=f"{removal} cannot work between a forward pass with gradient checkpoint"):
            REMOVALS[removal](model)
        loss.backward()
        assert gradients(model)
        return
    REMOVALS[removal](model)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(base)))
    del loss
    gc.collect()
    for each in (base, copied):
        for parameter in each.parameters():
            parameter.requires_grad_(True)
        loss_of(each).backward()
        assert gradients(each)
        left = [module for module in each.modules() if module._forward_pre_hooks]
        assert not left or each is copied  # a copy's hooks go where they are called


@reentrant_or_not
def test_passes_that_are_done_dropped_or_another_models_leave_no_trace(reentrant: bool) -> None:
    other, model, done = net(reentrant, "linear"), net(reentrant, "linear"), net(reentrant, "linear")
    pending = loss_of(other)
    loss_of(model)  # dropped
    loss = loss_of(done)
    loss.backward()
    with torch.no_grad():
        loss_of(model)
    for each in (model, done):
        base = each.unload()
        assert not any(module._forward_pre_hooks for module in base.modules())
    assert pending.requires_grad and loss.requires_grad
    block = other.base_model.linear
    later = checkpoint(lambda x: block(x) * 1.0, X.clone().requires_grad_(), use_reentrant=reentrant)
    del pending
    other.unload()
    with pytest.raises(RuntimeError, match=REFUSED):
        later.sum().backward()


def test_a_change_that_was_undone_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    model = net(True, "linear")
    loss = loss_of(model)
    with monkeypatch.context() as patch:
        patch.setattr("veratune.adapters.merging.guard_loading", fail)
        with pytest.raises(MemoryError):
            model.merge_adapter()
    loss.backward()
    assert gradients(model)
    loss = loss_of(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


@reentrant_or_not
def test_checkpointing_of_transformers(reentrant: bool) -> None:
    def model_of(kind: bool | None) -> VeraModel:
        model = get_peft_model(tiny_model("llama"), VeraConfig(r=3, target_modules="all-linear"), adapter_name="a")
        model.add_adapter("b", VeraConfig(r=3, target_modules="all-linear", projection_prng_key=3))
        fill(model)
        model.train()
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        return model

    ids = torch.tensor([[3, 9, 4, 11]])
    expected, model = model_of(None), model_of(reentrant)
    for each in (expected, model):
        each(ids, labels=ids, use_cache=False).loss.backward()
    grads = gradients(model)
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6)
    loss = model(ids, labels=ids, use_cache=False).loss
    model.set_adapter("b")
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


@reentrant_or_not
def test_a_copy_of_a_model_has_a_history_of_its_own(reentrant: bool) -> None:
    model = net(reentrant)
    twin = copy.deepcopy(model)
    loss = loss_of(twin)
    model.set_adapter("b")
    loss.backward()
    assert gradients(twin) and not gradients(model)


def test_nothing_is_left_on_the_model() -> None:
    for leave in (VeraModel.unload, VeraModel.merge_and_unload):
        base = leave(net(None))
        assert not any(module._forward_pre_hooks for module in base.modules())
    model = net(None)
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_checks_of_biases_do_not_keep_a_layer_from_being_computed_in_one() -> None:
    layer = net(None).vera_layers()["linear"]
    assert layer.base_layer._forward_pre_hooks and layer.weight_readable("a")
    layer.base_layer.register_forward_pre_hook(lambda *_: None)
    assert not layer.weight_readable("a")


def test_a_log_forgets_what_lies_far_back_and_then_refuses() -> None:
    log = StateLog()
    leaf = torch.ones(1, requires_grad=True)
    pending: list[Tensor] = []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            log.check("this")
            return g

    for index in range(300):
        log.record(State((str(index % 2),)))
        pending.append(Recomputed.apply(leaf))
    log.check("outside of a backward pass nothing is checked")
    pending[-1].backward()
    pending[-3].backward()  # the same state, two changes ago
    for old in (pending[-2], pending[1]):
        with pytest.raises(RuntimeError, match="this is recomputed in a backward pass"):
            old.backward()


def test_a_compiled_model_is_not_stopped_by_the_checks() -> None:
    model = net(None, "linear")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(compiled(x, ONES), model(x, ONES))
    compiled(x, ONES).square().sum().backward()
    assert gradients(model)


# In PEFT


def in_peft(reentrant: bool | None) -> Any:
    peft = pytest.importorskip("peft")
    from veratune.integrations.peft import VeratuneConfig, install

    install()

    def config(key: int) -> VeratuneConfig:
        return VeratuneConfig(
            r=3,
            target_modules=list(LAYERS[:4]),
            target_parameters=["experts.up_proj"],
            modules_to_save=["head"],
            projection_prng_key=key,
        )

    torch.manual_seed(0)
    base = Net()
    model = peft.get_peft_model(base, config(0), adapter_name="one")
    model.add_adapter("two", config(3))
    fill(model)
    base.reentrant = reentrant
    return model


PEFT_CHANGES: dict[str, Callable[[Any], Any]] = {
    "another": lambda model: model.set_adapter("two"),
    "merged": lambda model: model.base_model.merge_adapter(),
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "deleted": lambda model: model.delete_adapter("one"),
}


@pytest.mark.filterwarnings("ignore:Adapter one was active:UserWarning")
@reentrant_or_not
@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (layer, change)
        for layer in (*LAYERS, "head")
        for change in PEFT_CHANGES
        if (layer, change) != ("head", "merged")
    ],
)
def test_in_peft_each_kind_refuses_as_well(reentrant: bool, layer: str, change: str) -> None:
    model = in_peft(reentrant)
    model.base_model.model.only = layer
    loss = loss_of(model)
    PEFT_CHANGES[change](model)
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()
    assert not gradients(model)


@reentrant_or_not
@pytest.mark.parametrize("removal", ["unload", "merge_and_unload"])
def test_in_peft_a_model_without_adapters_notices_it(reentrant: bool, removal: str) -> None:
    model = in_peft(reentrant)
    loss = loss_of(model)
    with pytest.raises(ValueError, match=f"{removal} cannot work between"):
        getattr(model, removal)()
    loss.backward()
    assert gradients(model)
    model = in_peft(reentrant)
    model.base_model.model.only = "linear"
    loss = loss_of(model)
    getattr(model, removal)()
    with pytest.raises(RuntimeError, match=REFUSED):
        loss.backward()


@reentrant_or_not
def test_in_peft_what_is_put_back_gives_the_gradients_of_no_checkpointing(reentrant: bool) -> None:
    def step(model: Any) -> dict[str, Tensor]:
        loss = loss_of(model)
        with torch.no_grad(), model.disable_adapter():
            loss_of(model)
        model.base_model.merge_adapter()
        model.base_model.unmerge_adapter()
        loss.backward()
        return gradients(model)

    expected, actual = step(in_peft(None)), step(in_peft(reentrant))
    assert expected.keys() == actual.keys() and len(expected) == 12
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


# Values that are written between the two passes


def written_restored(model: VeraModel, place: Path) -> None:
    model.restore(place)


def written_by_step(model: VeraModel, place: Path) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1).step()
    for parameter in parameters:
        parameter.grad = None


def written_by_load(model: VeraModel, place: Path) -> None:
    model.load_state_dict(model.state_dict())


def written_before_another_pass(model: VeraModel, place: Path) -> None:
    written_by_step(model, place)
    loss_of(model)
    with torch.no_grad():
        loss_of(model)


WRITES = (written_restored, written_by_step, written_by_load, written_before_another_pass)


@reentrant_or_not
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("layer", [*LAYERS, "norm", "head"])
def test_values_written_before_the_backward_pass_are_noticed(
    reentrant: bool, layer: str, write: Callable[[VeraModel, Path], None], tmp_path: Path
) -> None:
    model = net(reentrant, layer)
    model.save_pretrained(tmp_path)
    loss = loss_of(model)
    write(model, tmp_path)
    with pytest.raises(RuntimeError, match="with different values than in the forward pass"):
        loss.backward()
    assert not gradients(model)
    loss_of(model).backward()
    assert gradients(model)


@reentrant_or_not
def test_a_merged_weight_that_is_written_is_noticed(reentrant: bool) -> None:
    model = net(reentrant, "linear")
    model.merge_adapter()
    loss = loss_of(model)
    with torch.no_grad():
        model.base_model.linear.base_layer.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="with different values"):
        loss.backward()


@reentrant_or_not
def test_training_in_steps_gives_the_values_of_no_checkpointing(reentrant: bool) -> None:
    def train(model: VeraModel) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(4):
            for _ in range(2):  # gradients are accumulated
                loss_of(model).backward()
            with torch.no_grad():
                loss_of(model)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                loss_of(model)
            model.set_adapter("ab"[step % 2])
        return model.state_dict()

    expected, actual = train(net(None)), train(net(reentrant))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


@reentrant_or_not
def test_a_model_trains_in_another_thread_and_in_another_process(reentrant: bool) -> None:
    model = net(reentrant)
    for index in range(20):  # which moves this thread's numbers of nodes on
        model.set_adapter("ab"[index % 2])
        loss_of(model).backward()
    model.set_adapter("a")
    model.zero_grad()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with ThreadPoolExecutor(1) as other:
        for each in (model, *copies):
            other.submit(lambda each=each: loss_of(each).backward()).result()
            assert gradients(each)
            loss = other.submit(loss_of, each).result()
            each.set_adapter("b")
            with pytest.raises(RuntimeError, match=REFUSED):
                other.submit(loss.backward).result()
        for each in copies:  # as in a process whose numbers begin again
            each.set_adapter("a")
            assert not each.vera_layers()["linear"]._log.__getstate__()["_histories"]


@reentrant_or_not
@pytest.mark.parametrize("layer", ["linear", "head"])
def test_in_peft_values_written_before_the_backward_pass_are_noticed(reentrant: bool, layer: str) -> None:
    model = in_peft(reentrant)
    model.base_model.model.only = layer
    loss = loss_of(model)
    written_by_step(model, Path())
    with pytest.raises(RuntimeError, match="with different values than in the forward pass"):
        loss.backward()
    loss_of(model).backward()
    assert gradients(model)
