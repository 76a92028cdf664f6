"""The states of the matrix: families of models, and what a model is brought into. A state is one of each."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from state_matrix import Env, flags
from state_truth import Adapter, Reference, Tiny, Truth
from veratune import AdapterState, VeraConfig, VeraModel, get_peft_model

LINEAR = {"r": 3, "target_modules": ["up", "down"], "modules_to_save": []}
KINDS = {
    "target_modules": ["up", "down", "embed", "conv", "transposed", "fused"],
    "target_parameters": ["up_proj", "down_proj"],
    "fused_parts": {"fused": 2},
}


@dataclass(frozen=True)
class Family:
    """A kind of base model and of adapters.

    Attributes:
        make: makes the base model.
        settings: of the adapters' configurations.
        traits: what a method's needs look at.
        tolerance: of outputs, relative to the largest.
        reference: the base model in float64, if not simply that.
        rounding: see `Reference`.
    """

    make: Callable[[], nn.Module]
    settings: dict[str, Any]
    traits: frozenset[str] = frozenset()
    tolerance: float = 2e-5
    reference: Callable[[nn.Module], nn.Module] = lambda model: copy.deepcopy(model).double()
    rounding: Callable[[str, Tensor], Tensor] | None = None


def tiny(dtype: torch.dtype = torch.float32, **shape: bool) -> nn.Module:
    return copy.deepcopy(_prototype(dtype, **shape))


@cache
def _prototype(dtype: torch.dtype, **shape: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Tiny(**shape).to(dtype).eval()


class Square(Tiny):
    """With layers of a size that bitsandbytes' CPU kernels take."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 64), nn.Linear(64, 4)
        self.block.up, self.block.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)


def quantized() -> nn.Module:
    import bitsandbytes

    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = Square().eval()
    for name, layer in list(model.block.named_children()):
        assert isinstance(layer, nn.Linear)
        sizes = layer.in_features, layer.out_features
        new = bitsandbytes.nn.Linear4bit(
            *sizes, bias=layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.load_state_dict(layer.state_dict())
        model.block.set_submodule(name, new.to("cpu"))
    return model.train()  # in evaluation on a CPU bitsandbytes computes with half-precision numbers


def dequantized(model: nn.Module) -> nn.Module:
    from bitsandbytes import functional

    plain = Square().double()
    for name, parameter in plain.named_parameters():
        own = model.get_parameter(name)
        state = getattr(own, "quant_state", None)
        parameter.data = (own if state is None else functional.dequantize_4bit(own.data, state)).detach().double()
    return plain


def four_bits(name: str, weight: Tensor) -> Tensor:
    from bitsandbytes import functional

    if not (name.startswith("block.") and name.endswith(".weight")):
        return weight
    codes, state = functional.quantize_4bit(weight.float(), quant_type="nf4", blocksize=64, compress_statistics=True)
    return functional.dequantize_4bit(codes, state).double()


FAMILIES = {
    "linear": Family(tiny, {}, frozenset({"peft", "lora"})),
    "heads": Family(tiny, {"modules_to_save": ["head"]}, frozenset({"peft", "lora"})),
    "biases": Family(tiny, {"bias": "all"}, frozenset({"peft", "lora"})),
    "kinds": Family(partial(tiny, kinds=True), KINDS, frozenset({"lora"})),
    "tied": Family(partial(tiny, tied=True), {"target_modules": ["up", "head"]}, frozenset({"peft", "lora"})),
    "peft": Family(tiny, {"projection": "peft"}, frozenset({"peft", "lora"})),
    "half": Family(partial(tiny, torch.bfloat16), {"modules_to_save": ["head"]}, frozenset({"peft", "lora"}), 4e-2),
    "quantized": Family(
        quantized, {}, frozenset({"peft", "lora", "quantized"}), 1e-4, reference=dequantized, rounding=four_bits
    ),
}


def config_of(family: Family, name: str, **settings: Any) -> VeraConfig:
    key = {"default": 3, "other": 4, "new": 5}[name]
    rank = 3 if name == "default" or family.settings.get("projection") == "peft" else 2
    return VeraConfig(**{**LINEAR, **family.settings, "r": rank, "projection_prng_key": key, **settings})


def fill(state: AdapterState, seed: int) -> None:
    """Give an adapter values as if it had learned something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def adapted(family: Family, seed: int = 0) -> tuple[VeraModel, Reference, Truth]:
    """Return a model with the adapters "default", which is active, and "other"."""
    base = family.make()
    reference = Reference(family.reference(base).eval(), family.rounding)
    model = get_peft_model(base, config_of(family, "default"))
    model.add_adapter("other", config_of(family, "other"))
    for number_, name in enumerate(model.peft_config):
        fill(model.adapter_state(name), 100 * seed + number_)
    adapters = {name: Adapter.of(config, model.adapter_state(name)) for name, config in model.peft_config.items()}
    return model, reference, Truth(adapters, active=("default",), trainable=frozenset({"default"}))


def several(env: Env) -> None:
    env.model.set_adapter(["other", "default"])
    env.truth = env.truth.changed(active=("other", "default"), trainable=frozenset({"default", "other"}))


def none_active(env: Env) -> None:
    env.model.set_adapter([])
    env.truth = env.truth.changed(active=(), trainable=frozenset())


def merged(env: Env, *names: str) -> None:
    env.model.merge_adapter(list(names))
    env.truth = env.truth.changed(merged=names)


def merged_alone(env: Env) -> None:
    none_active(env)
    merged(env, "default")


def merged_both(env: Env) -> None:
    several(env)
    merged(env, "default", "other")


def within(env: Env, *names: str) -> None:
    env.context.enter_context(env.model.only(list(names)) if names else env.model.disable_adapter())
    env.truth = env.truth.changed(context=names, merged=(), waiting=env.truth.merged)


def disabled_while_merged(env: Env) -> None:
    merged(env, "default")
    within(env)


def frozen(env: Env) -> None:
    env.model.set_adapter("default", inference_mode=True)
    env.truth = env.truth.changed(trainable=frozenset())


def for_inference(env: Env) -> None:
    base = env.model.unload()
    directory = env.library("same")
    env.model = VeraModel.from_pretrained(base, directory)
    env.model.load_adapter(directory / "other", "other")
    env.model.train(env.original["training"])
    adapters = {name: env.adapter(name, env.state_of(name)) for name in ("default", "other")}
    assert all(adapters[name].same_values(own) for name, own in env.truth.adapters.items())
    env.truth = Truth(adapters, active=("default",))


def offloaded(env: Env) -> None:
    import accelerate

    accelerate.cpu_offload(env.model.base_model, execution_device=torch.device("cpu"))


def offloaded_before(env: Env) -> None:
    import accelerate

    base = env.model.unload()
    accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    env.model = VeraModel.from_pretrained(base, env.library("same"), is_trainable=True)
    env.model.load_adapter(env.library("same") / "other", "other", is_trainable=True)
    env.model.train(env.original["training"])


def checkpoint_wrapped(env: Env) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    env.model.base_model.block = checkpoint_wrapper(env.model.base_model.block)


def compiled(env: Env) -> None:
    # What a compiled layer computes is shown elsewhere; here its wrapper must not show in names.
    env.context.enter_context(torch.compiler.set_stance("force_eager"))
    block: Any = env.model.base_model.block
    block.up = torch.compile(block.up, backend="eager")


def in_data_parallel(env: Env) -> None:
    env.model.base_model.block = nn.DataParallel(env.model.base_model.block)


def checkpointing(env: Env) -> None:
    env.model.gradient_checkpointing_enable()


def sharded(env: Env) -> None:
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    fully_shard(env.model.base_model.block, mesh=mesh)
    fully_shard(env.model.base_model, mesh=mesh)


# What each mode does to a model whose adapter "default" is active, and what of it a method's needs look at.
MODES: dict[str, tuple[Callable[[Env], None], frozenset[str]]] = {
    "plain": (lambda _: None, frozenset()),
    "several": (several, frozenset()),
    "none_active": (none_active, frozenset()),
    "merged": (lambda env: merged(env, "default"), frozenset()),
    "merged_both": (merged_both, frozenset()),
    "merged_alone": (merged_alone, frozenset()),
    "merged_other": (lambda env: merged(env, "other"), frozenset()),
    "disabled": (within, frozenset()),
    "only": (lambda env: within(env, "other"), frozenset()),
    "disabled_while_merged": (disabled_while_merged, frozenset()),
    "frozen": (frozen, frozenset()),
    "for_inference": (for_inference, frozenset()),
    "offloaded": (offloaded, frozenset({"offloaded"})),
    "offloaded_before": (offloaded_before, frozenset({"offloaded"})),
    "checkpoint_wrapped": (checkpoint_wrapped, frozenset()),
    "compiled": (compiled, frozenset()),
    "in_data_parallel": (in_data_parallel, frozenset()),
    "checkpointing": (checkpointing, frozenset()),
    "sharded": (sharded, frozenset({"sharded"})),
}

_SEVERAL = {"several", "merged_both", "merged_other"}
_OF_ALL = ("plain", "merged", "only", "offloaded")
_OF_KINDS = (*_OF_ALL, "several", "merged_both", "merged_alone", "disabled_while_merged", "offloaded_before", "sharded")
_OF_FAMILIES = {"linear": tuple(MODES), "heads": tuple(MODES), "kinds": (*_OF_KINDS, "checkpoint_wrapped")}


def is_possible(family: str, mode: str) -> bool:
    """Return whether a state can be: heads or biases of two adapters cannot be active together, for example."""
    whole = bool(FAMILIES[family].settings.get("modules_to_save")) or "bias" in FAMILIES[family].settings
    if whole and mode in _SEVERAL:
        return False
    if family == "quantized":  # hooks and shards of bitsandbytes' weights are its own affair
        return mode not in ("offloaded", "offloaded_before", "sharded")
    return True


STATES = [
    (family, mode) for family in FAMILIES for mode in _OF_FAMILIES.get(family, _OF_ALL) if is_possible(family, mode)
]


def original_of(base: nn.Module) -> dict[str, Any]:
    """Return what a base model has to be again after `unload`."""
    return {
        "training": base.training,
        "bits": {name: parameter.detach().clone() for name, parameter in base.named_parameters()},
        "flags": flags(base),
        "names": [name for name, _ in base.named_modules()],
    }


def make_env(family: str, mode: str, library: Callable[[str, str], Path]) -> Env:
    """Return a model in a state."""
    own = FAMILIES[family]
    base = own.make()
    original = original_of(base)
    model, reference, truth = adapted(own)
    change, traits = MODES[mode]
    env = Env(family, mode, model, reference, truth, partial(library, family))
    env.tolerance, env.traits = own.tolerance, own.traits | traits
    env.original = original
    change(env)
    return env


def saved_adapters(root: Path) -> Callable[[str, str], Path]:
    """Return where a family's adapters are saved: "same" has the values of those in the states, "else" others."""

    @cache
    def directory(family: str, which: str) -> Path:
        place = root / family / which
        adapted(FAMILIES[family], seed=0 if which == "same" else 1)[0].save_pretrained(place)
        return place

    return directory
