from typing import Any

import torch
from torch import Tensor, nn

from reference import randomise, relative
from tiny_models import tiny_model
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.bank import AdapterBank

CUSTOMERS = ("anna", "bert", "carl")


def with_adapters(base: nn.Module, config: VeraConfig, scale: float = 0.5) -> VeraModel:
    """A model with three adapters: one of a smaller rank, one with another key."""
    model = get_peft_model(base, config, adapter_name="anna")
    model.add_adapter("bert", config.replace(r=config.r // 2))
    model.add_adapter("carl", config.replace(projection_prng_key=7))
    randomise(model, scale)
    for name in CUSTOMERS:
        for head in model.adapter_state(name).saved.values():
            for parameter in head.values():
                nn.init.normal_(parameter)
    return model.eval()


def bank_of(base: nn.Module, model: VeraModel, config: VeraConfig, **settings: Any) -> AdapterBank:
    bank = AdapterBank(base, config, **settings)
    for name in CUSTOMERS:
        bank.add(name, model, name)
    return bank


def alone(model: VeraModel, name: str | None, call: Any) -> Any:
    """What a call of the model with one adapter, or none, returns."""
    with torch.no_grad():
        if name is None:
            with model.disable_adapter():
                return call(model)
        model.set_adapter(name)
        return call(model)


def assert_alone(mixed: Tensor, names: list[str | None], model: VeraModel, call: Any, tolerance: float = 1e-5) -> None:
    """Each row is what the model computes with that row's adapter alone."""
    own = {name: alone(model, name, call) for name in {*names}}
    for row, name in enumerate(names):
        assert relative(mixed[row], own[name][row]) < tolerance


def tiny(kind: str, **settings: Any) -> tuple[AdapterBank, VeraModel]:
    config = VeraConfig(r=8, target_modules="all-linear", **settings)
    if kind != "t5":
        model = with_adapters(tiny_model(kind), config)
        return bank_of(tiny_model(kind), model, config), model
    # Adapters show in T5's outputs only where they are large, and float32 is then no reference for float32.
    model = with_adapters(tiny_model(kind), config, 2.0).double()
    return bank_of(tiny_model(kind).double(), model, config), model


def inputs_of(kind: str, rows: int = 5) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8)}
    ids = torch.randint(3, 50, (rows, 6))
    return {"input_ids": ids, "decoder_input_ids": ids[:, :3]} if kind == "t5" else {"input_ids": ids}
