"""Stage: how exact the gradients of b and d are with a bfloat16 layer and float32 vectors, ours and PEFT's."""

from functools import partial

import peft
import torch
from torch import Tensor, nn

import veratune
from gpu.harness import Figures, Stage
from gpu.models import forced, routes_on
from gpu.references import errors_of
from veratune.ops.planning import RouteChoice
from veratune.projections.schemes import SCHEMES

POINTS = ((2048, 2048, 256, 2048), (2048, 8192, 256, 8192), (4096, 4096, 1024, 2048))
TOY_POINTS = ((16, 24, 8, 32),)
PEFT = "PEFT"
KEY = 0
DTYPE = torch.bfloat16


def run(stage: Stage) -> None:
    for point in TOY_POINTS if stage.toy else POINTS:
        problem: list[Problem] = []

        def of_peft(point: tuple[int, int, int, int] = point, problem: "list[Problem]" = problem) -> Figures:
            problem.append(Problem(*point, stage.device))
            return errors(problem[0], *problem[0].of_peft())

        stage.case(f"{point} {PEFT}", of_peft, seconds=2)
        for scheme in SCHEMES:
            for route in ("auto", *routes_on(stage.device, scheme, point[2], *point[:2])):
                if problem:
                    stage.case(f"{point} {scheme} {route}", partial(of_ours, problem[0], scheme, route), seconds=0.5)


class Problem:
    """A layer in bfloat16, an input, an output's gradient, and vectors that an adapter may have learned."""

    def __init__(self, n: int, m: int, r: int, tokens: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.size, self.device = (n, m, r), device
        self.x, self.gradient = normal(tokens, n).to(DTYPE).to(device), normal(tokens, m).to(DTYPE).to(device)
        self.weight = (normal(m, n) / n**0.5).to(DTYPE).to(device)
        self.b, self.d = (0.1 * normal(m)).to(device), (0.1 + 0.05 * normal(r)).to(device)

    def base(self) -> nn.Module:
        n, m, _ = self.size
        base = nn.Linear(n, m, bias=False, device=self.device, dtype=DTYPE)
        base.weight.data = self.weight
        return nn.Sequential(base).requires_grad_(False)

    def exact(self, a: Tensor, up: Tensor) -> dict[str, Tensor]:
        """Return the gradients in float64 from A (r, in) and B with its scale, (r, out), as they are in float32."""
        a, up = a.to(self.device).double(), up.to(self.device).double()
        b, d = (vector.double().requires_grad_() for vector in (self.b, self.d))
        added = ((self.x.double() @ a.t()) * d @ up) * b
        added.backward(self.gradient.double())
        assert b.grad is not None and d.grad is not None
        return {"b": b.grad.cpu(), "d": d.grad.cpu()}

    def of(self, model: nn.Module, layer: nn.Module) -> dict[str, Tensor]:
        vectors = {"b": layer.vera_lambda_b["default"], "d": layer.vera_lambda_d["default"]}
        with torch.no_grad():
            for name, vector in vectors.items():
                vector.copy_(getattr(self, name))
        model(self.x.clone().requires_grad_()).backward(self.gradient)
        return {name: vector.grad.float().cpu() for name, vector in vectors.items()}

    def of_peft(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        config = peft.VeraConfig(r=self.size[2], target_modules=["0"], projection_prng_key=KEY)
        model = peft.get_peft_model(self.base(), config).to(self.device)
        layer = model.base_model.model[0]
        found = self.of(model, layer)
        a, up = layer.vera_A["default"], layer.vera_B["default"]
        return found, self.exact(a.detach(), up.detach().t())


def of_ours(problem: Problem, scheme: str, route: str) -> Figures:
    """Compare our gradients by one route."""
    config = veratune.VeraConfig(r=problem.size[2], target_modules=["0"], projection=scheme, projection_prng_key=KEY)
    model = veratune.get_peft_model(problem.base(), config)
    layer = model.vera_layers()["0"]
    with forced(None if route == "auto" else RouteChoice(route)):
        found = problem.of(model, layer)
    entry = layer.entries["default"]
    return errors(problem, found, problem.exact(entry.a.drawn(), entry.b[0].drawn() * entry.scale))


def errors(problem: Problem, found: dict[str, Tensor], exact: dict[str, Tensor]) -> Figures:
    """Return the relative errors of the norms."""
    values = {name: pair[1] for name, pair in errors_of(found, exact).items()}
    return {"relative_error": values, "line": f"db {values['b']:.1e}, dd {values['d']:.1e}"}
