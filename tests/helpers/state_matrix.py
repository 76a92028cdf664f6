"""The state matrices: every public method in every state is right by float64 algebra, or refused without a change."""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import veratune
from state_truth import IDS, Adapter, Reference, Truth, close, number, weighted
from veratune import AdapterState


@dataclass
class Env:
    """A model with adapters in some state, and the account of it.

    Attributes:
        family: the kind of base model and of adapters.
        mode: what was done to it.
        library: the directory of saved adapters: "same" has the values of the state, "else" others.
        path: where to write.
        traits: what a method's needs look at.
        last: a snapshot, while nothing has changed the model.
        before: the account from before the method was called.
        original: of the base model, from before it was adapted.
        context: what is left at the end.
    """

    family: str
    mode: str
    model: Any
    reference: Reference
    truth: Truth
    library: Callable[[str], Path]
    path: Path = Path()
    tolerance: float = 2e-5
    traits: frozenset[str] = frozenset()
    last: dict[str, Any] = field(default_factory=dict)
    before: Truth = field(default_factory=lambda: Truth({}))
    original: dict[str, Any] = field(default_factory=dict)
    context: ExitStack = field(default_factory=ExitStack)

    def outputs(self) -> Tensor:
        with torch.no_grad():
            outputs = number(self.model(IDS))
        self.settle()
        return outputs

    @property
    def keeps_whole(self) -> bool:
        """Whether accelerate's hooks keep what is trained in full, of which they lose the gradients."""
        return "offloaded" in self.traits and any(adapter.whole for adapter in self.truth.adapters.values())

    def settle(self) -> None:
        """Let FSDP2 put the sharded parameters back, which it leaves to the next step."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # What the model says of itself

    def active(self) -> list[str]:
        return list(self.model.active_adapters)

    def merged(self) -> set[str]:
        return set(self.model.merged_adapters)

    def state_of(self, name: str) -> AdapterState:
        state: AdapterState = self.model.adapter_state(name)
        return state

    def adapter(self, name: str, state: AdapterState) -> Adapter:
        return Adapter.of(self.model.peft_config[name], state)

    def refuses(self, error: BaseException) -> bool:
        """Return whether an error is one that a method may raise instead of doing what it promises."""
        return is_ours(error)

    def check(self) -> None:
        """Compare all that the model computes and says of itself with the account of its state."""
        model, truth = self.model, self.truth
        close("outputs", self.outputs(), self.reference.outputs(truth), self.tolerance)
        assert list(model.peft_config) == list(truth.adapters)
        assert self.active() == list(truth.now)
        assert self.merged() == set(truth.merged)
        for name, told in truth.adapters.items():
            state, adapter = self.state_of(name), told
            if "offloaded" in self.traits:  # heads and biases are where their hooks keep them
                state = replace(state, saved={}, biases={})
                adapter = replace(adapter, saved={}, biases={})
            assert self.adapter(name, state).same_values(adapter), f"the values of {name} are others"
            found = {parameter.requires_grad for parameter in state.parameters()}
            assert found == {name in truth.trainable}, f"{name} requires gradients: {found}"
        self._check_gradients()

    def _check_gradients(self) -> None:
        learning = [name for name in self.truth.now if name in self.truth.trainable and name not in self.truth.merged]
        if not learning:
            return
        try:
            weighted(_whole(self.model(IDS))).backward()
        except RuntimeError as error:
            if self.keeps_whole and is_ours(error):
                self.model.zero_grad()
                return
            raise
        for name in learning:
            expected = self.reference.gradients(self.truth, name)
            for layer, vectors in self.state_of(name).vectors.items():
                for vector, gradient in zip(vectors.values(), expected[layer], strict=True):
                    assert vector.grad is not None, f"{layer} of {name} got no gradient"
                    close(f"gradient of {layer}", vector.grad, gradient, 4 * self.tolerance)
        self.model.zero_grad()
        self.settle()

    def snapshot(self) -> dict[str, Any]:
        return {"outputs": self.outputs(), **snapshot(self.model)}

    def leave(self) -> None:
        """Leave the context that the state is in."""
        if "compiled" not in self.mode:  # without it torch would compile, which other tests do
            self.context.close()
        self.truth = self.truth.left()


# `make fuzz` takes every mode of every family, where `make test` takes those that differ in what they exercise.
WIDE = "VERATUNE_FUZZ" in os.environ

Need = Callable[[Any], bool]


@dataclass(frozen=True)
class Method:
    """One way of calling a public method.

    Attributes:
        name: the method.
        call: calls it.
        needs: without all of these it may be refused, by an error of ours that leaves everything as it was.
        after: the state that it leads to.
        check: looks at what it returned or wrote.
        ends: whether the model is no adapted one any more.
        variant: which way of calling it.
    """

    name: str
    call: Callable[[Any], Any]
    needs: tuple[Need, ...] = ()
    after: Callable[[Truth], Truth] = lambda truth: truth
    check: Callable[[Any, Any], None] = lambda env, result: None
    ends: bool = False
    variant: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}[{self.variant}]" if self.variant else self.name


def never(env: Any) -> bool:
    return False


def run(env: Any, method: Method, expected: Callable[[Any, Method], Any], live_on: Callable[[Any], None]) -> bool:
    """Call a method, check what came of it, and return whether all is in the same state still.

    Args:
        env: the state.
        method: the method.
        expected: returns the account of the state after it.
        live_on: checks the rest of a model's life, after a method that has changed it.
    """
    before = env.last
    if not before:
        env.check()
        before = env.last = env.snapshot()
    env.before = env.truth
    unmet = [need.__name__ for need in method.needs if not need(env)] + ["kept by hooks"] * env.keeps_whole
    result: Any = None
    error: Exception | None = None
    try:
        result = method.call(env)
    except Exception as raised:
        error = raised
    if error is not None:
        assert env.refuses(error), f"{type(error).__name__} that is none of ours: {error}"
        assert unmet, f"refused, though nothing speaks against it: {error}"
        same(before, env.snapshot())
        return True
    assert not {"never", "are_together"} & set(unmet), "not refused"
    env.truth = expected(env, method)
    method.check(env, result)
    if method.ends:
        env.context.close()
        method.check(env, result)
        return False
    if method.name != "live on" and env.truth is env.before:
        same(before, env.snapshot())
        return True
    env.check()
    try:
        live_on(env)
    except (ValueError, RuntimeError) as refusal:
        if not (env.keeps_whole and is_ours(refusal)):
            raise
    return False


class Kept:
    """The state of the last test, as long as nothing has changed it: making one takes longer than most methods."""

    def __init__(self) -> None:
        self._key: object = None
        self._env: Any = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """Return the kept state if it is this one, or make it. It is kept no longer until `keep` is called."""
        if self._key != key:
            self.forget()
            self._env = make()
        env, self._key, self._env = self._env, None, None
        return env

    def keep(self, key: object, env: Any) -> None:
        self._key, self._env = key, env

    def forget(self) -> None:
        if self._env is not None:
            self._env.context.close()
        self._key = self._env = None


def run_kept(
    kept: Kept,
    key: object,
    make: Callable[[], Any],
    path: Path,
    method: Method,
    expected: Callable[[Any, Method], Any],
    live_on: Callable[[Any], None],
) -> None:
    """Run a method in the state of this key, which is kept if the method changes nothing; `path` is free for it."""
    env = kept.get(key, make)
    env.path = path
    try:
        unchanged = run(env, method, expected, live_on)
    except BaseException:
        env.context.close()
        raise
    if unchanged:
        kept.keep(key, env)
    else:
        env.context.close()


def public_names(*classes: type, of: tuple[str, ...] = ("veratune.",)) -> set[str]:
    """Return the names of the public methods and properties that classes and their bases define in these packages."""
    return {
        name
        for cls in classes
        for base in cls.__mro__
        if base.__module__.startswith(of)
        for name, value in vars(base).items()
        if not name.startswith("_") and not isinstance(value, bool | int | str | tuple | frozenset)
    }


def _whole(output: Any) -> Tensor:
    return output.full_tensor() if hasattr(output, "full_tensor") else output


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return all that a refused call must leave as it was: bits, flags, lists, and which module stands where."""
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    lists = ("active_adapters", "merged_adapters", "added_adapters", "disable_adapters", "active_adapter")
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in modules],
        "lists": {(name, own): _listed(module, own) for name, module in modules for own in lists},
        # Optimizers hold what is trained.
        "tensors": {
            name: (not tensor.is_meta and tensor.requires_grad and id(tensor), bits(tensor)) for name, tensor in tensors
        },
        "keys": list(model.state_dict()),
        "configs": {name: repr(config) for name, config in getattr(model, "peft_config", {}).items()},
    }


def _listed(module: nn.Module, name: str) -> Any:
    try:
        value = getattr(module, name, None)
    except ValueError:  # there is no single active adapter
        return None
    return list(value) if isinstance(value, list) else value


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}


def bits(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return "meta"
    here: Any = getattr(tensor.detach(), "to_local", tensor.detach)()
    # A copy, as torch never resizes again what numpy has seen, which FSDP2 does.
    own = here.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
    return (here.dtype, tuple(here.shape), own.numpy().tobytes())


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise AssertionError unless two snapshots are equal, naming what differs."""
    for part, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[part]), f"{part} are others"
        elif isinstance(value, dict):
            assert value.keys() == after[part].keys(), (part, value.keys() ^ after[part].keys())
            differing = [key for key, own in value.items() if own != after[part][key]]
            assert not differing, f"{part} differ: {differing[:4]}"
        else:
            assert value == after[part], f"{part} are others"


_SOURCES = str(Path(veratune.__file__).parent)


def is_ours(error: BaseException, *sources: str) -> bool:
    """Return whether an error was raised by a line of veratune (or of `sources`), rather than of what it calls."""
    if not isinstance(error, ValueError | TypeError | RuntimeError | AttributeError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.filename.startswith((_SOURCES, *sources)) and not isinstance(
        error, AttributeError | NotImplementedError
    )


def read_native(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of veratune's own, in float64, by their keys."""
    return {key: tensor.double() for key, tensor in load_file(directory / "adapter_model.safetensors").items()}


def native_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return what such a file has to hold of an adapter, projections aside."""

    def entries() -> Iterator[tuple[str, Tensor]]:
        for layer, (b, d) in adapter.vectors.items():
            yield f"vera_lambda_b.{layer}", b
            yield f"vera_lambda_d.{layer}", d
        for module, tensors in adapter.saved.items():
            for key, tensor in tensors.items():
                yield f"modules_to_save.{module}.{key}", tensor
        for name, bias in adapter.biases.items():
            yield f"bias.{name}", bias

    return dict(entries())


def check_native(directory: Path, adapter: Adapter) -> None:
    found, expected = read_native(directory), native_tensors(adapter)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
