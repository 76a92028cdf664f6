"""Adapted layers under torch's transformations: derivatives of any order, `torch.func`, export and pickling."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from reference import projections, randomise
from small_net import FIRST_LAYER, dense_weight, small_adapted, small_inputs
from veratune import VeraConfig, get_peft_model


@pytest.mark.parametrize("route", ["auto", "factored", "dense"])
def test_second_derivatives_are_refused_not_zero(route):
    model, x = small_adapted(route=route), small_inputs(3).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (model(x).sum() + grad.square().sum()).backward()
    b, _ = model.base_model[0].vectors("default").values()
    (grad,) = torch.autograd.grad(model(x).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_torch_func_of_any_order():
    model, x = small_adapted(), small_inputs(3)
    layer = model.base_model[0]
    b, d = (vector.detach() for vector in layer.vectors("default").values())
    a_projection, b_projection = projections(0, 4, 8, 8)

    def ours(b):
        values = {"0.vera_lambda_b.default": b}
        return torch.func.functional_call(model.base_model, values, (x,)).square().sum()

    def dense(b):
        weight = layer.base_weight.detach() + torch.diag(b) @ b_projection @ torch.diag(d) @ a_projection
        y = torch.relu(nn.functional.linear(x, weight, layer.bias.detach()))
        return model.base_model[2](y).square().sum()

    for transform in (
        torch.func.grad,
        torch.func.hessian,
        lambda f: torch.func.grad(lambda v: torch.func.grad(f)(v).sum()),
    ):
        torch.testing.assert_close(transform(ours)(b), transform(dense)(b), rtol=1e-5, atol=1e-5)
    tangent = torch.randn_like(b)
    torch.testing.assert_close(torch.func.jvp(ours, (b,), (tangent,)), torch.func.jvp(dense, (b,), (tangent,)))
    batch = torch.stack([b, 2 * b, -b])
    torch.testing.assert_close(torch.func.vmap(ours)(batch), torch.stack([ours(v) for v in batch]))
    samples = torch.func.vmap(torch.func.grad(lambda v, s: ours(v) * s), in_dims=(None, 0))(b, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(samples[1], 2 * samples[0])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_forward_mode_derivatives(frozen, hooked):
    model, x, tangent = small_adapted(route="factored"), small_inputs(3), small_inputs(3)
    model.set_adapter("default", inference_mode=frozen)
    layer = model.base_model[0]
    if hooked:  # the base layer is called, and the adapter's output added
        layer.base_layer.register_forward_hook(lambda *_: None)
    with forward_ad.dual_level():
        derivative = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(derivative, tangent @ dense_weight(layer).T)


@pytest.mark.parametrize("projection", ["per_dimension", "blocks"])
def test_gradients_for_each_sample_through_an_embedding(projection):
    settings = {"r": 6, "projection": projection, "projection_blocks": 2} if projection == "blocks" else {"r": 6}
    table = nn.Sequential(nn.Embedding(10, 6, padding_idx=2)).double()
    model = get_peft_model(table, VeraConfig(target_modules=["0"], **settings))
    randomise(model)
    tokens = torch.tensor([[1, 2, 3], [4, 4, 0]])
    values = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}

    def loss(values, tokens):
        return torch.func.functional_call(model, values, (tokens,)).square().sum()

    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, tokens)
    for sample, row in enumerate(tokens):
        own = torch.autograd.grad(model(row).square().sum(), [dict(model.named_parameters())[name] for name in values])
        for gradients, gradient in zip(batched.values(), own, strict=True):
            torch.testing.assert_close(gradients[sample], gradient)


def test_one_vector_alone_can_be_trained():
    for kept in ("vera_lambda_b", "vera_lambda_d"):
        model, x = small_adapted(), small_inputs(300)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept in name)
        model(x).square().sum().backward()
        reference = small_adapted()
        reference(x).square().sum().backward()
        grads = {name: p.grad for name, p in reference.named_parameters()}
        for name, parameter in model.named_parameters():
            if kept in name:
                torch.testing.assert_close(parameter.grad, grads[name])
            else:
                assert parameter.grad is None


def test_a_first_use_inside_transformations_harms_nothing_later():
    model = get_peft_model(nn.Sequential(nn.Linear(59, 59)), VeraConfig(**FIRST_LAYER))
    x, values = torch.randn(2, 59), {k: v.detach() for k, v in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    inner = torch.func.grad(loss)
    torch.func.grad(lambda v: inner(v)["base_model.0.vera_lambda_b.default"].sum())(values)
    torch.func.grad(loss)(values)
    model(x).sum().backward()


@pytest.mark.parametrize("warm", [False, True])
def test_export_leaves_the_model_as_it_was(warm):
    model = get_peft_model(nn.Sequential(nn.Linear(61, 67)), VeraConfig(**FIRST_LAYER)).eval()
    randomise(model)
    x = torch.randn(4, 61)
    twin = copy.deepcopy(model)
    expected = model(x).detach() if warm else None
    exported = torch.export.export(twin, (x,), strict=False)
    expected = model(x).detach() if expected is None else expected
    torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(exported.module()(x), expected)
    assert not torch.equal(twin(x), twin.base_model[0].base_layer(x))


PICKLED = """
import pickle, sys, torch
model, x, expected = pickle.load(open(sys.argv[1], "rb"))
assert torch.equal(model(x), expected)
print("equal")
"""


def test_a_pickle_draws_its_projections_in_another_process(tmp_path):
    import pickle
    import subprocess
    import sys

    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), VeraConfig(**FIRST_LAYER))
    randomise(model)
    x = torch.randn(3, 8)
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, x, model(x).detach())))
    result = subprocess.run([sys.executable, "-c", PICKLED, str(path)], capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr
