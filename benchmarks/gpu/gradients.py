"""Stage: outputs and gradients of all routes and of all kinds of layers, against float64 dense algebra on the CPU."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import veratune
from gpu.harness import Figures, Stage
from gpu.models import routes_on
from gpu.references import call_dense, dense_model, errors_of, verdict
from veratune.ops.factors import Factors
from veratune.ops.linear import adapted_linear, residual
from veratune.ops.planning import RouteChoice
from veratune.projections.pool import ProjectionPool
from veratune.projections.schemes import SCHEMES
from veratune.projections.structure import Matrix

DTYPES = (torch.float32, torch.bfloat16)
# (in, out, r, T): square and not, a rank above the widths, few tokens, widths that no tile divides.
POINTS = ((1024, 1024, 256, 2048), (512, 2048, 256, 512), (2048, 512, 1024, 300), (384, 1000, 64, 1), (130, 66, 24, 37))
TOY_POINTS = ((24, 40, 8, 6), (40, 24, 64, 3))


def run(stage: Stage) -> None:
    for dtype in DTYPES:
        for kind, make in KINDS.items():
            for scheme in SCHEMES:
                if kind == "linear" or not SCHEMES[scheme].one_rank_linear_only:
                    key = f"{kind}, {scheme}, {short(dtype)}"
                    stage.case(key, partial(one_kind, stage, make, scheme, dtype))
    points = TOY_POINTS if stage.toy else POINTS
    for dtype in DTYPES:
        for point in points:
            for scheme in SCHEMES:
                problem = cache(partial(Problem, *point, scheme, dtype, stage.device))  # made once for all routes
                n, m, r, _ = point
                routes = routes_on(stage.device, scheme, r, n, m)
                for choice in (RouteChoice(route, keep) for route in routes for keep in (False, True)):
                    stage.case(f"{point} {scheme} {choice} {short(dtype)}", partial(one_route, problem, choice))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem:
    """One layer's tensors in a dtype on a device, and the exact output and gradients of just these values."""

    def __init__(self, n: int, m: int, r: int, tokens: int, scheme: str, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.device, self.dtype = device, dtype
        self.x, self.gradient = normal(tokens, n).to(dtype), normal(tokens, m).to(dtype)
        self.weight, self.bias = (normal(m, n) / n**0.5).to(dtype), normal(m).to(dtype)
        self.b, self.d = 0.1 * normal(m), 0.1 + 0.05 * normal(r)
        own = SCHEMES[scheme].for_layers(3, r, n, m)
        self.scale = own.scale(r)
        pool = ProjectionPool()
        self.views = pool.view(own, "A", r, n), pool.view(own, "B", r, m)
        self.exact = self._reference()

    def _reference(self) -> dict[str, Tensor]:
        names = ("x", "weight", "bias", "b", "d")
        x, weight, bias, b, d = (getattr(self, name).double().requires_grad_() for name in names)
        # Projections are rounded to the compute dtype before they are used: that is no error of the computation.
        a, up = (view.drawn().to(self.dtype).double() for view in self.views)
        y = x @ (weight + torch.diag(b) @ (self.scale * up).t() @ torch.diag(d) @ a).t() + bias
        y.backward(self.gradient.double())
        leaves = dict(zip(names, (x, weight, bias, b, d), strict=True))
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"y": y.detach(), **grads}

    def found(self, choice: RouteChoice, kind: str) -> dict[str, Tensor]:
        """Return a route's output and gradients: of a linear layer, of a transposed one, or added to an output."""
        x, weight, bias, b, d = (
            getattr(self, name).to(self.device, copy=True).requires_grad_()
            for name in ("x", "weight", "bias", "b", "d")
        )
        a, up = (view.matrix(self.device, self.dtype) for view in self.views)
        factors = Factors(Matrix(*a), Matrix(*up), b, a.structure.arrange(d), self.scale)
        if kind == "linear":
            y = adapted_linear(x, weight, bias, factors, choice)
        elif kind == "transposed":
            y = adapted_linear(x, weight.t(), bias, factors, choice, transposed=True)
        else:
            y = residual(torch.nn.functional.linear(x, weight, bias), x, factors, choice)
        y.backward(self.gradient.to(self.device))
        leaves = {"x": x, "weight": weight, "bias": bias, "b": b, "d": d}
        return {"y": y} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def one_route(make: Callable[[], Problem], choice: RouteChoice) -> Figures:
    """Compare one route, in all ways to call it."""
    problem = make()
    kinds = ("linear", "transposed") if choice.reads_weight else ("linear", "transposed", "residual")
    errors = {}
    for kind in kinds:
        found = errors_of(problem.found(choice, kind), problem.exact)
        errors |= {f"{kind} {name}": values for name, values in found.items()}
    return verdict(errors, problem.dtype)


# Kinds of layers: (module, the adapter's settings, the call of it or of its float64 copy)

Kind = tuple[nn.Module, dict[str, Any], Callable[[Any, torch.device], Tensor]]


def _linear() -> Kind:
    module = nn.Sequential(nn.Linear(96, 80))
    return module, {"target_modules": ["0"]}, _on_numbers(64, 96)


def _fused() -> Kind:
    module = nn.Sequential(nn.Linear(96, 120))
    return module, {"target_modules": ["0"], "fused_parts": {"0": [64, 32, 24]}}, _on_numbers(64, 96)


def _conv1d() -> Kind:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(80, 96)), {"target_modules": ["0"]}, _on_numbers(64, 96)


def _convolution() -> Kind:
    module = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1, groups=2))
    return module, {"target_modules": ["0"]}, _on_numbers(4, 8, 9, 9)


def _embedding() -> Kind:
    ids = torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(1))
    return nn.Sequential(nn.Embedding(100, 64)), {"target_modules": ["0"]}, lambda model, device: model(ids.to(device))


def _attention() -> Kind:
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.attn(x, x, x, need_weights=False)[0]
            return output

    settings = {"target_modules": "all-linear"}
    return Attention(), settings, lambda model, device: model(_like(x, model, device))


def _experts() -> Kind:
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    model = MixtralModel(config).eval()
    config._experts_implementation = "eager"  # grouped products know no float64
    model.config._experts_implementation = "eager"
    block = next(module for name, module in model.named_modules() if name.endswith("mlp"))
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    return block, {"target_modules": "all-linear"}, lambda model, device: _first(model(_like(x, model, device)))


KINDS: dict[str, Callable[[], Kind]] = {
    "linear": _linear,
    "fused": _fused,
    "Conv1D": _conv1d,
    "convolution": _convolution,
    "embedding": _embedding,
    "packed attention": _attention,
    "experts": _experts,
}


def _on_numbers(*size: int) -> Callable[[Any, torch.device], Tensor]:
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16()
    return lambda model, device: model(_like(x, model, device))


def _like(x: Tensor, model: Any, device: torch.device) -> Tensor:
    """Return an input on a device, in the dtype of the model's weights; float64 for the reference."""
    dtype = model.dtype if isinstance(model, _Reference) else _weights_dtype(model)
    return x.bfloat16().to(device, dtype)  # the same values in every dtype


def _weights_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in model.named_parameters() if "vera_lambda" not in name)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


class _Reference:
    """What a kind's call gets in place of a model."""

    dtype = torch.float64

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def one_kind(stage: Stage, make: Callable[[], Kind], scheme: str, dtype: torch.dtype) -> Figures:
    """Compare a layer kind's output and the gradients of its vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        base, settings, call = make()
    base = base.to(dtype).requires_grad_(False)
    twin, _, _ = make()
    twin.load_state_dict(base.state_dict())
    twin = twin.double().requires_grad_(False)
    config = veratune.VeraConfig(r=24, projection=scheme, **settings)
    model = veratune.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.vera_layers().values():
            for vector in layer.vectors("default").values():
                vector.copy_(0.4 * torch.randn(vector.shape, generator=generator))
    cpu = torch.device("cpu")
    weights, leaves = dense_model(model)
    expected = call_dense(twin, weights, lambda dense: call(_Reference(dense), cpu))
    weighting = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = torch.autograd.grad((expected * weighting).sum(), list(leaves.values()))
    exact = {"y": expected, **dict(zip(leaves, grads, strict=True))}
    model.to(stage.device)
    y = call(model, stage.device)
    vectors = [vector for layer in model.vera_layers().values() for vector in layer.vectors("default").values()]
    own = torch.autograd.grad((y * weighting.to(y.device, y.dtype)).sum(), vectors)
    return verdict(errors_of({"y": y, **dict(zip(leaves, own, strict=True))}, exact), dtype)
