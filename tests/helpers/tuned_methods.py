"""The methods of PEFT's models and tuners for the state matrix, with veratune's layers in them."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from state_matrix import Method, never
from state_methods import at_hand, gathered, together
from state_truth import IDS, Truth, close
from tuned_states import TUNED_FAMILIES, TunedEnv, other_values, tuned_config
from veratune import VeraModel
from veratune.integrations.peft.layers import TunedLayer, TunedModule

# Of other methods than those of layers.
NOT_OURS = {"get_prompt", "get_prompt_embedding_to_save", "tuner_layer_cls", "target_module_mapping"}


def unmerged(*names: str) -> Callable[[TunedEnv], bool]:
    return lambda env: not {*names} & {*env.truth.merged, *env.truth.waiting}


def one_head(env: TunedEnv) -> bool:
    """Whether merging leaves no vectors with another adapter's head: those of the active one alone are in use."""
    return not any(adapter.saved for adapter in env.truth.adapters.values())


def active(env: TunedEnv) -> bool:
    return bool(env.truth.active)


def chosen(*names: str, frozen: bool = False) -> Callable[[Truth], Truth]:
    """Return the state after a choice, for which PEFT unmerges; what is disabled stays so."""

    def after(truth: Truth) -> Truth:
        trainable = frozenset() if frozen else frozenset(name for name in names if not truth.adapters[name].frozen)
        return truth.changed(active=names, trainable=trainable, merged=(), waiting=(), resting=frozenset())

    return after


def deleted(name: str) -> Callable[[Truth], Truth]:
    """Return the state after deleting an adapter: if it was the only active one, PEFT chooses the first other one."""

    def after(truth: Truth) -> Truth:
        left = truth.without(name)
        if name not in truth.active:
            return left
        names = left.active or tuple(sorted(left.adapters))[:1]
        return chosen(*names)(left).changed(merged=left.merged, waiting=())

    return after


def merges(*names: str) -> Callable[[Truth], Truth]:
    def after(truth: Truth) -> Truth:
        before = truth.merged if truth.context is None else truth.waiting
        now = tuple(dict.fromkeys((*before, *(names or truth.active))))
        return truth.changed(merged=now) if truth.context is None else truth.changed(waiting=now)

    return after


def flagged(name: str, trainable: bool) -> Callable[[Truth], Truth]:
    def after(truth: Truth) -> Truth:
        now = truth.trainable | {name} if trainable else truth.trainable - {name}
        return truth.changed(trainable=now, resting=truth.resting - {name})

    return after


def adding(truth: Truth) -> Truth:
    """Return the state after adding another adapter, whose values `expected` gives."""
    return truth.changed(adapters={**truth.adapters, "new": truth.adapters["other"]})


def loading_over(truth: Truth) -> Truth:
    return truth.changed()


def expected(env: TunedEnv, method: Method) -> Truth:
    """Return the state that a method promises."""
    after = method.after(env.truth)
    adapters = dict(after.adapters)
    if method.name in ("add_adapter", "inject_adapter"):
        base, pattern = env.reference.weights(), env.truth.adapters["other"]
        # In the layer's dtype, which PEFT widens.
        initial = torch.tensor(0.1, dtype=torch.bfloat16 if env.family == "half" else torch.float32).double()
        adapters["new"] = replace(
            pattern,
            key=5,
            vectors={
                layer: (torch.zeros_like(b), torch.full_like(d, float(initial)))
                for layer, (b, d) in pattern.vectors.items()
            },
            saved={m: {key: base[f"{m}.{key}"] for key in own} for m, own in pattern.saved.items()},
            frozen=False,
        )
    elif method.name == "load_adapter" and method.variant == "over":
        adapters["other"] = replace(other_values(env.family)["other"], frozen=env.truth.adapters["other"].frozen)
    elif method.name == "load_adapter":
        adapters["new"] = replace(other_values(env.family)["default"], frozen=method.variant == "frozen")
        if method.variant == "trainable":
            after = after.changed(trainable=after.trainable | {"new"})
    elif after is env.truth:
        return after
    return after.changed(adapters=adapters)


def live_on(env: TunedEnv) -> None:
    """Take a model through the rest of its life: out of its context, with another adapter, and without any."""
    env.leave()
    env.check()
    for name, adapter in list(env.truth.adapters.items())[-1:]:
        env.model.set_adapter(name)
        trainable = frozenset() if adapter.frozen else frozenset({name})
        env.truth = env.truth.changed(active=(name,), trainable=trainable, merged=())
        env.check()
    env.before = env.truth
    unloaded(env, env.model.unload())


# What methods give back, against the reference


def equal(expected: Callable[[Truth], Any]) -> Callable[[TunedEnv, Any], None]:
    def check(env: TunedEnv, result: Any) -> None:
        assert result == expected(env.truth)

    return check


def shared_ranks(truth: Truth) -> dict[str, int]:
    return {name: own.vectors["block.up"][1].numel() for name, own in truth.adapters.items() if own.scheme == "peft"}


def has_outputs(env: TunedEnv, result: Any) -> None:
    close("outputs", result, env.reference.outputs(env.truth), env.tolerance)


def has_base_outputs(env: TunedEnv, result: Tensor) -> None:
    close("outputs without adapters", result, env.reference.outputs(env.truth, ()), env.tolerance)


def has_next(env: TunedEnv, ids: Tensor) -> None:
    assert torch.equal(ids[:, -1], env.reference.outputs(env.truth)[:, -1].argmax(-1))


def free_of_peft(model: nn.Module) -> bool:
    return not any(isinstance(module, TunedLayer | TunedModule | ModulesToSaveWrapper) for module in model.modules())


def unloaded(env: TunedEnv, result: nn.Module) -> None:
    """Check that a model is the base model, with the active adapter's head, which PEFT leaves in it."""
    assert free_of_peft(result)
    adapters = {name: replace(own, vectors={}) for name, own in env.before.adapters.items()}
    with torch.no_grad():
        expected = env.reference.outputs(env.before.changed(adapters=adapters), env.before.active)
        close("outputs of the base model", result(IDS), expected, env.tolerance)


def merged_for_good(*names: str) -> Callable[[TunedEnv, Any], None]:
    def check(env: TunedEnv, result: nn.Module) -> None:
        assert free_of_peft(result)
        own = tuple(dict.fromkeys((*env.before.merged, *env.before.waiting, *(names or env.before.active))))
        truth = env.before.changed(merged=own)
        with torch.no_grad():
            close("outputs of the merged model", result(IDS), env.reference.outputs(truth, own), env.tolerance)

    return check


def counted(env: TunedEnv, result: Any) -> None:
    parts = [env.truth.adapters[name].flat() for name in env.truth.trainable]
    assert result[0] == sum(tensor.numel() for part in parts for own in part for tensor in own.values())
    assert result[1] == sum(parameter.numel() for parameter in env.model.parameters())


def printed(env: TunedEnv) -> Any:
    env.model.print_trainable_parameters()
    return env.model.get_nb_trainable_parameters()


def has_status(env: TunedEnv, layers: Any) -> None:
    truth = env.truth
    for own in layers:
        if not own.module_type.startswith("Tuned"):
            continue
        assert own.enabled == (truth.context is None) and set(own.available_adapters) == set(truth.adapters)
        assert sorted(own.active_adapters) == sorted(truth.active) and set(own.merged_adapters) == set(truth.merged)


def is_saved(env: TunedEnv, _: Any) -> None:
    """Check files by loading them with veratune on the plain base model."""
    for name in env.truth.adapters:
        base = copy.deepcopy(env.reference.model).to(torch.bfloat16 if env.family == "half" else torch.float32)
        directory = env.path / "saved" / ("" if name == "default" else name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = VeraModel.from_pretrained(base, directory)
        expected = env.reference.outputs(env.truth.changed(merged=()), [name])
        close(f"outputs of the saved {name}", theirs(IDS).detach(), expected, env.tolerance)


def injected(env: TunedEnv) -> Any:
    env.model.peft_config["new"] = tuned_config(env.family, "new")
    try:
        env.model.base_model.inject_adapter(env.model.base_model.model, "new")
    except BaseException:
        del env.model.peft_config["new"]
        raise


def without_adapters(env: TunedEnv) -> Tensor:
    with env.model.disable_adapter():
        return env.outputs()


def switched_off_and_on(env: TunedEnv) -> Tensor:
    env.model.base_model.disable_adapter_layers()
    try:
        return env.outputs()
    finally:
        env.model.base_model.enable_adapter_layers()


def again(env: TunedEnv) -> Any:
    return peft.PeftModel.from_pretrained(env.model.base_model.model, env.library("same"))


def methods() -> list[Method]:
    """Return all ways of calling the public methods of a `PeftModel` and of its tuner."""

    def asked(name: str, told: Callable[[Truth], Any]) -> Method:
        return Method(name, lambda env: getattr(env.model, name), check=equal(told))

    def calls(name: str, *args: Any, **kwargs: Any) -> Callable[[TunedEnv], Any]:
        return lambda env: getattr(env.model, name)(*args, **kwargs)

    def chooses(names: Any, **settings: Any) -> Callable[[TunedEnv], Any]:
        return lambda env: env.model.base_model.set_adapter(names, **settings)

    return [
        Method("forward", torch.no_grad()(lambda env: env.model.forward(IDS)), check=has_outputs),
        Method("forward", lambda env: env.model.base_model(IDS, adapter_names=["default", "other"]), (never,),
               variant="rows"),
        Method("forward", torch.no_grad()(lambda env: env.model.base_model.forward(IDS)), check=has_outputs,
               variant="of the tuner"),
        Method("generate", torch.no_grad()(lambda env: env.model.generate(IDS)), check=has_next),
        asked("active_adapters", lambda truth: list(truth.active)),
        asked("has_active_enabled_adapter", lambda truth: truth.context is None or not truth.active),
        asked("base_model_torch_dtype", lambda _: None),
        Method("peft_config", lambda env: list(env.model.peft_config), check=equal(lambda t: list(t.adapters))),
        Method("active_peft_config", lambda env: env.model.active_peft_config is env.model.peft_config["default"],
               check=lambda env, same: same or env.truth.active != ("default",)),
        Method("modules_to_save", lambda env: bool(env.model.modules_to_save),
               check=equal(lambda truth: any(adapter.saved for adapter in truth.adapters.values()))),
        Method("vera_A", lambda env: {name: env.model.base_model.vera_A[name].shape[0] for name in
               env.model.base_model.vera_A}, check=equal(shared_ranks)),
        Method("vera_B", lambda env: {name: env.model.base_model.vera_B[name].shape[1] for name in
               env.model.base_model.vera_B}, check=equal(shared_ranks)),
        Method("get_base_model", lambda env: env.model.get_base_model() is env.model.base_model.model,
               check=equal(lambda _: True)),
        Method("get_model_config", lambda env: env.model.base_model.get_model_config(env.model.base_model.model),
               check=equal(lambda _: {"model_type": "custom"})),
        Method("get_nb_trainable_parameters", calls("get_nb_trainable_parameters"), check=counted),
        Method("print_trainable_parameters", printed, check=counted),
        Method("get_layer_status", calls("get_layer_status"), check=has_status),
        Method("get_model_status", lambda env: env.model.get_model_status().enabled,
               check=equal(lambda truth: truth.context is None)),
        Method("supports_lora_conversion", calls("supports_lora_conversion"),
               check=lambda env, yes: equal(lambda _: env.family != "kinds")(env, yes)),
        Method("prepare_model_for_gradient_checkpointing", lambda env:
               env.model.prepare_model_for_gradient_checkpointing(env.model.base_model.model)),
        Method("create_or_update_model_card", lambda env: (env.path.mkdir(parents=True),
               env.model.create_or_update_model_card(str(env.path))), check=lambda env, _: None),
        Method("add_adapter", lambda env: env.model.add_adapter("new", tuned_config(env.family, "new")),
               (gathered,), adding),
        Method("add_adapter", lambda env: env.model.add_adapter("other", tuned_config(env.family, "new")), (never,),
               variant="taken"),
        Method("add_adapter", lambda env: env.model.add_adapter("new", peft.LoraConfig(target_modules=["up"])),
               (never,), variant="another method's"),
        Method("inject_adapter", injected, (gathered,), adding),
        Method("load_adapter", lambda env: env.model.load_adapter(env.library("else"), "new"), (gathered,), adding,
               variant="frozen"),
        Method("load_adapter", lambda env: env.model.load_adapter(env.library("else"), "new", is_trainable=True),
               (gathered,), adding, variant="trainable"),
        Method("load_adapter", lambda env: env.model.load_adapter(env.library("else") / "other", "other"),
               (gathered, unmerged("other")), loading_over, variant="over"),
        Method("from_pretrained", again, (never,), variant="adapted already"),
        Method("set_adapter", calls("set_adapter", "default"), (), chosen("default")),
        Method("set_adapter", calls("set_adapter", "other"), (), chosen("other"), variant="other"),
        Method("set_adapter", calls("set_adapter", "other", inference_mode=True), (), chosen("other", frozen=True),
               variant="frozen"),
        Method("set_adapter", calls("set_adapter", "none"), (never,), variant="unknown"),
        Method("set_adapter", chooses(["default", "other"]), (together("default", "other"),),
               chosen("default", "other"), variant="both"),
        Method("set_adapter", chooses(["default", "none"]), (never,), variant="one unknown"),
        Method("set_requires_grad", calls("set_requires_grad", "default", False), (), flagged("default", False)),
        Method("set_requires_grad", calls("set_requires_grad", ["other"]), (), flagged("other", True), variant="other"),
        Method("set_requires_grad", calls("set_requires_grad", "none"), (never,), variant="unknown"),
        Method("delete_adapter", calls("delete_adapter", "other"), (unmerged("other"),), deleted("other")),
        Method("delete_adapter", calls("delete_adapter", "default"), (unmerged("default"),), deleted("default"),
               variant="default"),
        Method("delete_adapter", calls("delete_adapter", "none"), (never,), variant="unknown"),
        Method("disable_adapter", without_adapters, (gathered,), check=has_base_outputs),
        Method("disable_adapter_layers", switched_off_and_on, (gathered,), Truth.left, has_base_outputs),
        Method("enable_adapter_layers", lambda env: env.model.base_model.enable_adapter_layers(), (), Truth.left),
        Method("merge_adapter", calls("merge_adapter"), (at_hand, active), merges()),
        Method("merge_adapter", calls("merge_adapter", ["other"], safe_merge=True), (at_hand, one_head),
               merges("other"), variant="other"),
        Method("merge_adapter", calls("merge_adapter", ["default", "other"]), (at_hand, one_head),
               merges("default", "other"), variant="both"),
        Method("merge_adapter", calls("merge_adapter", ["none"]), (never,), variant="unknown"),
        Method("unmerge_adapter", calls("unmerge_adapter"), (), lambda truth: truth.changed(merged=(), waiting=())),
        Method("merge_and_unload", calls("merge_and_unload"), (at_hand, active), check=merged_for_good(), ends=True),
        Method("merge_and_unload", calls("merge_and_unload", adapter_names=["other"], safe_merge=True),
               (at_hand, one_head), check=merged_for_good("other"), ends=True, variant="other"),
        Method("merge_and_unload", calls("merge_and_unload", adapter_names=["none"]), (never,), variant="unknown"),
        Method("unload", calls("unload"), check=unloaded, ends=True),
        Method("save_pretrained", lambda env: env.model.save_pretrained(env.path / "saved"), check=is_saved),
        Method("save_pretrained", lambda env: env.model.save_pretrained(env.path / "saved", selected_adapters=["none"]),
               (never,), variant="unknown"),
        Method("live on", lambda env: None),
    ]  # fmt: skip


TUNED_METHODS = methods()
__all__ = ["NOT_OURS", "TUNED_FAMILIES", "TUNED_METHODS", "expected", "live_on"]
