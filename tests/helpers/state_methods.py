"""The methods of the matrix: for each public one of `VeraModel`, what it promises, and what it may need for that."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from state_matrix import Env, Method, Need, bits, check_native, flags, never
from state_setups import FAMILIES, adapted, config_of, fill
from state_truth import IDS, Adapter, Truth, close, number
from veratune import VeraModel, get_peft_model
from veratune.adapters.plan import plan_adapter


def unmerged(env: Env) -> bool:
    return not env.truth.merged


def outside(env: Env) -> bool:
    return env.truth.context is None


def one_active(env: Env) -> bool:
    return len(env.truth.now) == 1


def some_active(env: Env) -> bool:
    return bool(env.truth.now)


def gathered(env: Env) -> bool:
    return "sharded" not in env.traits


def at_hand(env: Env) -> bool:
    """Whether weights are in this process and on their device."""
    return not {"sharded", "offloaded"} & env.traits


def fits_peft(env: Env) -> bool:
    return "peft" in env.traits


def fits_lora(env: Env) -> bool:
    return "lora" in env.traits


def together(*names: str, beside: bool = False) -> Need:
    """Return whether these adapters may compute together (and beside those that do): one trains something in full."""

    def are_together(env: Env) -> bool:
        computing = {*names, *(env.truth.computing if beside else ())}
        return sum(env.truth.adapters[name].whole for name in computing) < 2

    return are_together


def unwrapped(env: Env) -> bool:
    """Whether nothing stands between the names of modules."""
    return not any(name in env.mode for name in ("wrapped", "compiled", "parallel"))


def chosen(*names: str) -> Callable[[Truth], Truth]:
    def after(truth: Truth) -> Truth:
        trainable = frozenset(name for name in names if not truth.adapters[name].frozen)
        return truth.changed(active=names, trainable=trainable)

    return after


def with_new(name: str, adapter: Callable[[Truth], Adapter]) -> Callable[[Truth], Truth]:
    return lambda truth: truth.changed(adapters={**truth.adapters, name: adapter(truth)})


def merges(names: Iterable[str] | None = None) -> Callable[[Truth], Truth]:
    def after(truth: Truth) -> Truth:
        new = truth.now if names is None else names
        return truth.changed(merged=tuple(dict.fromkeys((*truth.merged, *new))))

    return after


def equal(expected: Callable[[Truth], Any]) -> Callable[[Env, Any], None]:
    def check(env: Env, result: Any) -> None:
        assert result == expected(env.truth)

    return check


# What methods give back, against the reference


def state_as_told(env: Env, result: Any) -> None:
    adapter = env.truth.adapters["other"]
    assert result.vectors.keys() == adapter.vectors.keys()
    for layer, vectors in result.vectors.items():
        b, d = adapter.vectors[layer]
        assert torch.equal(number(vectors["b"]), b) and torch.equal(number(vectors["d"]), d)
    assert result.biases.keys() == adapter.biases.keys() and result.saved.keys() == adapter.saved.keys()


def layers_as_told(env: Env, result: Any) -> None:
    assert set(result) == {layer for adapter in env.truth.adapters.values() for layer in adapter.vectors}


def counted(env: Env, result: Any) -> None:
    trainable = 0
    for name in env.truth.trainable:
        vectors, saved, biases = env.truth.adapters[name].flat()
        # Biases are in the model only while they compute.
        parts = [vectors, saved, biases if name in env.truth.computing else {}]
        trainable += sum(tensor.numel() for part in parts for tensor in part.values())
    assert result[0] == trainable
    assert result[1] == sum(parameter.numel() for parameter in env.model.parameters())


def routes_as_told(env: Env, table: Any) -> None:
    text = str(table)
    assert "up" in text and "embed" not in text


def computes(*names: str) -> Callable[[Env, Any], None]:
    """Check that a context, whose outputs were returned, has let these adapters compute."""

    def check(env: Env, result: Tensor) -> None:
        close("outputs within the context", result, env.reference.outputs(env.truth.changed(merged=()), names),
              env.tolerance)  # fmt: skip

    return check


def base_back(env: Env, result: nn.Module) -> None:
    """Check that a model is what it was before it was adapted, to the bit."""
    found = dict(result.named_parameters())
    if unwrapped(env):
        assert [name for name, _ in result.named_modules()] == env.original["names"]
        assert flags(result) == env.original["flags"]
        if at_hand(env):
            for name, value in env.original["bits"].items():
                assert bits(found[name]) == bits(value), name
    with torch.no_grad():
        close("outputs of the base model", result(IDS), env.reference.outputs(env.truth, ()), env.tolerance)


def merged_for_good(*names: str) -> Callable[[Env, Any], None]:
    def check(env: Env, result: nn.Module) -> None:
        assert not any(type(module).__module__.startswith("veratune") for module in result.modules())
        own = names or env.before.now
        truth = env.before.changed(merged=tuple(own))
        with torch.no_grad():
            close("outputs of the merged model", result(IDS), env.reference.outputs(truth, own), env.tolerance)
        if unwrapped(env):
            assert flags(result) == env.original["flags"]

    return check


def interrupted(env: Env) -> None:
    """Change what is active on every layer, and fail."""
    with suppress(KeyboardInterrupt), env.model.undone_on_error():
        for layer in env.model.vera_layers().values():
            layer.activate([])
        raise KeyboardInterrupt


def native_files(env: Env, _: Any) -> None:
    for name, adapter in env.truth.adapters.items():
        check_native(env.path / "saved" / ("" if name == "default" else name), adapter)


def pushed_files(env: Env, _: Any) -> None:
    check_native(env.path / "pushed", env.truth.adapters["default"])


def by_peft(name: str = "default") -> Callable[[Env, Any], None]:
    """Check an export by loading it with PEFT on the plain base model."""

    def check(env: Env, _: Any) -> None:
        import peft

        base = copy.deepcopy(env.reference.model).float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(base, str(env.path / "exported"))
        expected = env.reference.outputs(env.truth.changed(merged=()), [name])
        close("outputs in PEFT", theirs(IDS), expected, env.tolerance)

    return check


# Calls


def entered(context: Any, env: Env) -> Tensor:
    with context:
        return env.outputs()


def pushed(env: Env) -> Any:
    import shutil

    def upload(directory: Path, repo_id: str, **_: Any) -> str:
        shutil.copytree(directory, env.path / "pushed")
        return repo_id

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("veratune.model.upload_directory", upload)
        return env.model.push_to_hub("somebody/something")


def printed(env: Env) -> Any:
    env.model.print_trainable_parameters()
    return env.model.get_nb_trainable_parameters()


def new_config(env: Env) -> Any:
    return config_of(FAMILIES[env.family], "new")


def fresh(env_truth: Truth, base: dict[str, Tensor]) -> Adapter:
    """Return an adapter as it starts: b is zero, d a tenth, heads and biases are the model's own."""
    pattern = env_truth.adapters["other"]
    return replace(
        pattern,
        key=5,
        vectors={layer: (torch.zeros_like(b), torch.full_like(d, 0.1, dtype=torch.float32).double())
                 for layer, (b, d) in pattern.vectors.items()},
        saved={m: {key: base[f"{m}.{key}"] for key in own} for m, own in pattern.saved.items()},
        biases={name: base[name] for name in pattern.biases},
        frozen=False,
    )  # fmt: skip


def restored(env: Env) -> None:
    env.model.restore(env.library("else"))


def state_loaded(env: Env) -> Any:
    """Give the active adapter other values through a state dict, as a checkpoint of training does."""
    with torch.no_grad():
        own = {key: tensor for key, tensor in env.model.state_dict().items() if key.endswith(".default")}
        state = {key: -tensor if ".vera_lambda_d." in key else tensor.clone() for key, tensor in own.items()}
    return env.model.load_state_dict(state, strict=False)


def negated(truth: Truth) -> Truth:
    own = truth.adapters["default"]
    vectors = {layer: (b, -d) for layer, (b, d) in own.vectors.items()}
    return truth.changed(adapters={**truth.adapters, "default": replace(own, vectors=vectors)})


def copied(env: Env) -> VeraModel:
    return copy.deepcopy(env.model)


def pickled(env: Env) -> VeraModel:
    model: VeraModel = pickle.loads(pickle.dumps(env.model))
    return model


def is_a_copy(env: Env, result: VeraModel) -> None:
    own = replace(env, model=result)
    own.check()
    with suppress(ValueError):
        fill(result.adapter_state("default"), 99)
    env.check()  # the copy shares nothing with it


def evaluated(env: Env) -> None:
    env.model.train(not env.original["training"])
    env.model.train(env.original["training"])


def methods() -> list[Method]:
    """Return all ways of calling the public methods of a `VeraModel`."""
    new = with_new("new", lambda truth: truth.adapters["other"])  # replaced by the runner, which knows the base
    take_away = lambda name: lambda truth: truth.without(name)  # noqa: E731
    activating = (unmerged, outside)
    return [
        Method("forward", torch.no_grad()(lambda env: env.model.forward(IDS)), check=lambda env, out: close(
            "outputs", out, env.reference.outputs(env.truth), env.tolerance)),
        Method("active_adapters", lambda env: env.model.active_adapters, check=equal(lambda t: list(t.now))),
        Method("active_adapter", lambda env: env.model.active_adapter, (one_active,), check=equal(lambda t: t.now[0])),
        Method("merged_adapters", lambda env: set(env.model.merged_adapters), check=equal(lambda t: set(t.merged))),
        Method("adapter_state", lambda env: env.model.adapter_state("other"), check=state_as_told),
        Method("adapter_state", lambda env: env.model.adapter_state("none"), (never,), variant="unknown"),
        Method("vera_layers", lambda env: env.model.vera_layers(), check=layers_as_told),
        Method("projection_scheme", lambda env: env.model.projection_scheme("default").key, check=equal(lambda _: 3)),
        Method("get_base_model", lambda env: env.model.get_base_model() is env.model.base_model,
               check=equal(lambda _: True)),
        Method("get_nb_trainable_parameters", lambda env: env.model.get_nb_trainable_parameters(), check=counted),
        Method("print_trainable_parameters", printed, check=counted),
        Method("explain_routes", lambda env: env.model.explain_routes(16), (one_active,), check=routes_as_told),
        Method("explain_routes", lambda env: env.model.explain_routes(16, "other"), check=routes_as_told,
               variant="named"),
        Method("check_new_name", lambda env: env.model.check_new_name("new")),
        Method("check_new_name", lambda env: env.model.check_new_name("other"), (never,), variant="taken"),
        Method("add_adapter", lambda env: env.model.add_adapter("new", new_config(env)), (gathered,), new),
        Method("add_adapter", lambda env: env.model.add_adapter("other", new_config(env)), (never,), variant="taken"),
        Method("undone_on_error", interrupted),
        Method("install_adapter", lambda env: env.model.install_adapter(
            "new", plan_adapter(env.model.base_model, new_config(env))), (gathered,), new),
        Method("load_adapter", lambda env: env.model.load_adapter(env.library("else"), "new"), (gathered,),
               with_new("new", lambda truth: truth.adapters["default"]), variant="frozen"),
        Method("load_adapter", lambda env: env.model.load_adapter(env.library("else"), "new", is_trainable=True),
               (gathered,), with_new("new", lambda truth: truth.adapters["default"]), variant="trainable"),
        Method("load_adapter", lambda env: env.model.load_adapter(env.library("else"), "other"), (never,),
               variant="taken"),
        Method("from_pretrained", lambda env: VeraModel.from_pretrained(env.model.base_model, env.library("else")),
               (never,), variant="adapted already"),
        Method("get_peft_model", lambda env: get_peft_model(env.model, new_config(env)), (never,)),
        Method("restore", restored, (unmerged,)),
        Method("load_state_dict", state_loaded, (unmerged,), negated),
        Method("set_adapter", lambda env: env.model.set_adapter("default"), activating, chosen("default")),
        Method("set_adapter", lambda env: env.model.set_adapter("other"), activating, chosen("other"), variant="other"),
        Method("set_adapter", lambda env: env.model.set_adapter(["default", "other"]),
               (*activating, together("default", "other")), chosen("default", "other"), variant="both"),
        Method("set_adapter", lambda env: env.model.set_adapter([]), activating, chosen(), variant="none"),
        Method("set_adapter", lambda env: env.model.set_adapter("other", inference_mode=True), activating,
               lambda truth: truth.changed(active=("other",), trainable=frozenset()), variant="frozen"),
        Method("set_adapter", lambda env: env.model.set_adapter(["default", "none"]), (never,), variant="unknown"),
        Method("delete_adapter", lambda env: env.model.delete_adapter("other"), (unmerged,), take_away("other")),
        Method("delete_adapter", lambda env: env.model.delete_adapter("default"), (unmerged,), take_away("default"),
               variant="default"),
        Method("delete_adapter", lambda env: env.model.delete_adapter("none"), (never,), variant="unknown"),
        Method("disable_adapter", lambda env: entered(env.model.disable_adapter(), env), (gathered,),
               check=computes()),
        Method("only", lambda env: entered(env.model.only(["other"]), env), (gathered,), check=computes("other")),
        Method("only", lambda env: entered(env.model.only(["other", "default"]), env),
               (gathered, together("default", "other")), check=computes("other", "default"), variant="both"),
        Method("only", lambda env: entered(env.model.only(["none"]), env), (never,), variant="unknown"),
        Method("merge_adapter", lambda env: env.model.merge_adapter(), (at_hand, outside, some_active), merges()),
        Method("merge_adapter", lambda env: env.model.merge_adapter("other", safe_merge=True),
               (at_hand, outside, together("other", beside=True)), merges(["other"]), variant="other"),
        Method("merge_adapter", lambda env: env.model.merge_adapter(["default", "other"]),
               (at_hand, outside, together("default", "other", beside=True)), merges(["default", "other"]),
               variant="both"),
        Method("merge_adapter", lambda env: env.model.merge_adapter("none"), (never,), variant="unknown"),
        Method("unmerge_adapter", lambda env: env.model.unmerge_adapter(), (),
               lambda truth: truth.changed(merged=())),
        Method("merge_and_unload", lambda env: env.model.merge_and_unload(), (at_hand, some_active),
               check=merged_for_good(), ends=True),
        Method("merge_and_unload", lambda env: env.model.merge_and_unload(adapter_names=["other"], safe_merge=True),
               (at_hand,), check=merged_for_good("other"), ends=True, variant="other"),
        Method("unload", lambda env: env.model.unload(), check=base_back, ends=True),
        Method("gradient_checkpointing_enable", lambda env: env.model.gradient_checkpointing_enable()),
        Method("save_pretrained", lambda env: env.model.save_pretrained(env.path / "saved"), check=native_files),
        Method("save_pretrained", lambda env: env.model.save_pretrained(env.path / "saved", selected_adapters="none"),
               (never,), variant="unknown"),
        Method("push_to_hub", pushed, check=pushed_files),
        Method("export_peft", lambda env: env.model.export_peft(env.path / "exported", "default"),
               (gathered, fits_peft), check=by_peft()),
        Method("export_peft", lambda env: env.model.export_peft(env.path / "exported"),
               (gathered, fits_peft, one_active), check=lambda env, _: by_peft(env.truth.now[0])(env, _),
               variant="active"),
        Method("export", lambda env: env.model.export("peft", env.path / "exported", "default"),
               (gathered, fits_peft), check=by_peft()),
        Method("export_lora", lambda env: env.model.export_lora(env.path / "exported", "default"),
               (gathered, fits_lora), check=by_peft()),
        Method("export_lora", lambda env: env.model.export_lora(env.path / "exported", "other", rank=8),
               (gathered, fits_lora), check=by_peft("other"), variant="other"),
        Method("export_gguf", lambda env: env.model.export_gguf(env.path / "exported", "default"), (never,)),
        Method("copy.deepcopy", copied, (gathered,), check=is_a_copy),
        Method("pickle", pickled, (gathered,), check=is_a_copy),
        Method("train", evaluated, after=lambda truth: truth.changed()),
        Method("live on", lambda env: None),
    ]  # fmt: skip


METHODS = methods()


def expected(env: Env, method: Method) -> Truth:
    """Return the state that a method promises."""
    after = method.after(env.truth)
    adapters = dict(after.adapters)
    if method.name in ("add_adapter", "install_adapter"):
        adapters["new"] = fresh(env.truth, env.reference.weights())
    elif method.name == "load_adapter":
        adapters["new"] = replace(other_values(env.family)["default"], frozen=method.variant == "frozen")
    elif method.name == "restore":
        others = other_values(env.family)
        adapters = {name: replace(others[name], frozen=own.frozen) for name, own in adapters.items()}
    elif after is env.truth:
        return after
    return after.changed(adapters=adapters)


@cache
def other_values(family: str) -> dict[str, Adapter]:
    return adapted(FAMILIES[family], seed=1)[2].adapters


def live_on(env: Env) -> None:
    """Take a model through the rest of its life: out of its context, unmerged, with each adapter, and without any."""
    env.leave()
    env.check()
    if env.truth.merged:
        env.model.unmerge_adapter()
        env.truth = env.truth.changed(merged=())
        env.check()
    for name, adapter in env.truth.adapters.items():
        env.model.set_adapter(name)
        trainable = frozenset() if adapter.frozen else frozenset({name})
        env.truth = env.truth.changed(active=(name,), trainable=trainable)
        env.check()
    base_back(env, env.model.unload())
