"""The states of the matrix for PEFT's models on veratune's layers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
from peft.utils import ModulesToSaveWrapper
from torch import nn

from state_matrix import Env, is_ours
from state_setups import FAMILIES, MODES, Family, config_of, fill, frozen, merged
from state_truth import Adapter, Reference, Truth
from veratune import AdapterState
from veratune.adapters.names import adapted_layers, module_names, public_state
from veratune.integrations.peft import VeratuneConfig

_PEFT = str(Path(peft.__file__).parent)
# Base models, adapters and their reference are those of `VeraModel`'s matrix; "vera" is PEFT's own configuration.
TUNED_FAMILIES = {**{name: FAMILIES[name] for name in ("linear", "heads", "kinds", "half")}, "vera": FAMILIES["peft"]}


@dataclass
class TunedEnv(Env):
    """A `peft.PeftModel` in some state."""

    def layers(self) -> dict[str, Any]:
        return dict(adapted_layers(self.model.base_model.model))

    def active(self) -> list[str]:
        status = self.model.get_model_status()
        assert status.enabled != "irregular" and status.active_adapters != "irregular"
        assert sorted(status.active_adapters) == sorted(self.model.active_adapters)
        return list(self.model.active_adapters) if status.enabled else []

    def merged(self) -> set[str]:
        return {name for layer in self.layers().values() for name in layer.merged_adapters}

    def state_of(self, name: str) -> AdapterState:
        return tuned_state(self.model, name)

    def adapter(self, name: str, state: AdapterState) -> Adapter:
        return Adapter.of(self.model.peft_config[name], state, scheme_of(self.family))

    def refuses(self, error: BaseException) -> bool:
        return is_ours(error, _PEFT)


def tuned_state(model: Any, name: str) -> AdapterState:
    """Return an adapter's parameters by their names in the model without adapters."""
    base: nn.Module = model.base_model.model
    names = module_names(base)
    layers: dict[str, Any] = dict(adapted_layers(base))
    return AdapterState(
        vectors={layer: own.vectors(name) for layer, own in layers.items() if name in own.entries},
        saved={
            names[raw].public: public_state(module.modules_to_save[name])
            for raw, module in base.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
        },
    )


def tuned_config(family: str, name: str, **settings: Any) -> Any:
    own = config_of(TUNED_FAMILIES[family], name)
    values = {"r": own.r, "projection_prng_key": own.projection_prng_key, "target_modules": own.target_modules}
    if own.modules_to_save:
        values["modules_to_save"] = own.modules_to_save
    if family == "vera":
        return peft.VeraConfig(**values, **settings)
    values |= {"target_parameters": own.target_parameters, "fused_parts": own.fused_parts}
    return VeratuneConfig(**values, **settings)


def tuned(family: str, seed: int = 0) -> tuple[Any, Reference, Truth]:
    """Return a model with the adapters "default", which is active, and "other"."""
    own: Family = TUNED_FAMILIES[family]
    base = own.make()
    reference = Reference(own.reference(base).eval(), own.rounding)
    model = peft.get_peft_model(base, tuned_config(family, "default"))
    model.add_adapter("other", tuned_config(family, "other"))
    for number, name in enumerate(model.peft_config):
        fill(tuned_state(model, name), 100 * seed + number)
    return model, reference, Truth(told(model, family), active=("default",), trainable=frozenset({"default"}))


def told(model: Any, family: str) -> dict[str, Adapter]:
    return {
        name: Adapter.of(config, tuned_state(model, name), scheme_of(family))
        for name, config in model.peft_config.items()
    }


def scheme_of(family: str) -> str:
    return str(TUNED_FAMILIES[family].settings.get("projection", "per_dimension"))


@cache
def other_values(family: str) -> dict[str, Adapter]:
    return tuned(family, seed=1)[2].adapters


def saved_by_peft(root: Path) -> Callable[[str, str], Path]:
    """Return where a family's adapters are saved: "same" has the values of those in the states, "else" others."""

    @cache
    def directory(family: str, which: str) -> Path:
        tuned(family, seed=0 if which == "same" else 1)[0].save_pretrained(root / family / which)
        return root / family / which

    return directory


def several(env: TunedEnv) -> None:
    env.model.base_model.set_adapter(["other", "default"])
    env.truth = env.truth.changed(active=("other", "default"), trainable=frozenset({"default", "other"}))


def merged_both(env: TunedEnv) -> None:
    several(env)
    merged(env, "default", "other")


def disabled(env: TunedEnv) -> None:
    env.context.enter_context(env.model.disable_adapter())
    truth = env.truth
    env.truth = truth.changed(
        context=(), merged=(), waiting=truth.merged, trainable=frozenset(), resting=truth.trainable
    )


def disabled_while_merged(env: TunedEnv) -> None:
    merged(env, "default")
    disabled(env)


def for_inference(env: TunedEnv) -> None:
    base = TUNED_FAMILIES[env.family].make()
    env.model = peft.PeftModel.from_pretrained(base, env.library("same"))
    env.model.load_adapter(env.library("same") / "other", "other")
    env.truth = Truth(told(env.model, env.family), active=("default",))


def through(name: str) -> Callable[[TunedEnv], None]:
    """Return what a mode of `VeraModel`'s matrix does, done to the model inside PEFT's."""

    def change(env: TunedEnv) -> None:
        inside = copy.copy(env)
        inside.model = _Inside(env.model.base_model.model)
        MODES[name][0](inside)

    return change


class _Inside:
    """What the modes that wrap a model's modules look at."""

    def __init__(self, model: nn.Module) -> None:
        self.base_model: Any = model
        self.gradient_checkpointing_enable = self.base_model.gradient_checkpointing_enable


WRAPPING = ("offloaded", "checkpoint_wrapped", "compiled", "in_data_parallel", "checkpointing", "sharded")
TUNED_MODES: dict[str, tuple[Callable[[Any], None], frozenset[str]]] = {
    "plain": (lambda _: None, frozenset()),
    "several": (several, frozenset()),
    "merged": (lambda env: merged(env, "default"), frozenset()),
    "merged_both": (merged_both, frozenset()),
    "merged_other": (lambda env: merged(env, "other"), frozenset()),
    "disabled": (disabled, frozenset()),
    "disabled_while_merged": (disabled_while_merged, frozenset()),
    "frozen": (frozen, frozenset()),
    "for_inference": (for_inference, frozenset()),
    **{name: (through(name), MODES[name][1]) for name in WRAPPING},
}


def make_tuned(family: str, mode: str, library: Callable[[str, str], Path]) -> TunedEnv:
    """Return a model in a state."""
    own = TUNED_FAMILIES[family]
    model, reference, truth = tuned(family)
    change, traits = TUNED_MODES[mode]
    env = TunedEnv(family, mode, model, reference, truth, partial(library, family))
    env.tolerance, env.traits = own.tolerance, own.traits | traits
    change(env)
    return env
