"""TRL's trainers: with a `VeraModel` by `veratune.integrations.trl`, and with `peft_config=VeratuneConfig(...)`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from sentences import _sentence, texts  # noqa: E402
from tiny_models import TARGETS, main_output, tiny_model  # noqa: E402
from tiny_text import tiny_tokenizer  # noqa: E402
from trainers import losses  # noqa: E402
from veratune import VeraConfig, VeraModel, get_peft_model  # noqa: E402
from veratune.integrations.peft import VeratuneConfig, install  # noqa: E402
from veratune.integrations.peft.layers import TunedLayer  # noqa: E402
from veratune.integrations.trl import VeraDPOTrainer, VeraSFTTrainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
]


def preferences() -> Dataset:
    rows = [
        {"prompt": _sentence(seed), "chosen": " " + _sentence(100 + seed), "rejected": " " + _sentence(200 + seed)}
        for seed in range(12)
    ]
    return Dataset.from_list(rows)


def settings(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "max_length": 24,
        "disable_tqdm": True,
        **more,
    }


def own_model() -> VeraModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), VeraConfig(r=4, target_modules=TARGETS["llama"]))


def own_sft(directory: Path, **more: Any) -> Any:
    arguments = trl.SFTConfig(**settings(directory, **more))
    return VeraSFTTrainer(own_model(), arguments, train_dataset=texts(), processing_class=tiny_tokenizer())


def own_dpo(directory: Path, model: VeraModel | None = None, **more: Any) -> Any:
    arguments = trl.DPOConfig(**settings(directory, **more))
    return VeraDPOTrainer(
        own_model() if model is None else model,
        args=arguments,
        train_dataset=preferences(),
        processing_class=tiny_tokenizer(),
    )


def peft_trainer(
    kind: str, directory: Path, model: Any = None, config: Any = None, ref_model: Any = None, **more: Any
) -> Any:
    torch.manual_seed(0)
    trainer, arguments = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[kind]
    return trainer(
        model=tiny_model("llama") if model is None else model,
        args=arguments(**settings(directory, **more)),
        train_dataset=texts() if kind == "sft" else preferences(),
        processing_class=tiny_tokenizer(),
        peft_config=config,
        **({} if ref_model is None else {"ref_model": ref_model}),
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return main_output(model.eval(), "llama")


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def vera_config() -> VeratuneConfig:
    install()
    return VeratuneConfig(r=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_of_a_vera_model_is_that_of_the_same_model_without_trl(checkpointing: bool, tmp_path: Path) -> None:
    """The reference: the loss of the texts, computed by the model itself, and one AdamW step after another."""
    trainer = own_sft(tmp_path, max_steps=3, lr_scheduler_type="constant", gradient_checkpointing=checkpointing)
    reference = own_model()
    batches = [trainer._prepare_inputs(copy.deepcopy(batch)) for batch in trainer.get_train_dataloader()]
    torch.manual_seed(3)
    seen: list[Any] = []
    compute = trainer.compute_loss

    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(copy.deepcopy(inputs))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert batches and len(seen) == 3
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = []
    for inputs in seen:
        loss = reference(**{name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)
    trained = trainer._vera_model().adapter_state("default").vectors
    for name, vectors in reference.adapter_state("default").vectors.items():
        torch.testing.assert_close(trained[name], vectors, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("make", [own_sft, own_dpo])
def test_a_vera_model_is_saved_as_an_adapter_resumed_to_the_bit_and_loaded_again(make: Any, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    interrupted = make(tmp_path / "parts")
    interrupted.add_callback(StopAt(4))
    interrupted.train()
    assert interrupted.state.global_step == 4
    names = {path.name for path in (tmp_path / "parts" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    resumed = make(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    assert losses(resumed) == losses(whole)
    expected = logits(whole._vera_model())
    assert torch.equal(logits(resumed._vera_model()), expected)
    assert not torch.allclose(expected, logits(tiny_model("llama")))
    whole.save_model(str(tmp_path / "saved"))
    loaded = VeraModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)
    prompt = {"input_ids": torch.tensor([[3, 14, 15, 9]]), "max_new_tokens": 8, "do_sample": False}
    tokens = loaded.generate(**prompt)
    assert torch.equal(loaded.merge_and_unload().generate(**prompt), tokens)


def dpo_reference_losses(trainer: Any, model: VeraModel, reference: Any, beta: float = 0.1) -> tuple[list[float], Any]:
    """Train a twin by Rafailov et al.'s equation 7 on the batches that the trainer saw."""
    seen: list[Any] = []
    compute = trainer.compute_loss

    def watched(trained: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(copy.deepcopy(inputs))
        return compute(trained, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()

    def log_probability(net: Any, inputs: Any) -> torch.Tensor:
        output = net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        steps = output[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return (steps * inputs["completion_mask"][:, 1:]).sum(-1)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = []
    for inputs in seen:
        with torch.no_grad():
            before = log_probability(reference, inputs)
        chosen, rejected = (log_probability(model, inputs) - before).chunk(2)
        loss = -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    return expected, model


@pytest.mark.parametrize("learned", [False, True])
def test_dpo_compares_with_the_model_as_it_was(learned: bool, tmp_path: Path) -> None:
    """A new adapter with the base model, a trained one with itself; both by the equation, with a model of its own."""
    adapter = own_model()
    if learned:
        with torch.no_grad():
            for b in [own["b"] for own in adapter.adapter_state("default").vectors.values()]:
                b.normal_(std=0.3)
    twin, before = copy.deepcopy(adapter), copy.deepcopy(adapter)
    trainer = own_dpo(tmp_path, adapter, max_steps=4, lr_scheduler_type="constant", beta=0.1)
    assert sorted(adapter.peft_config) == (["default", "ref"] if learned else ["default"])
    expected, twin = dpo_reference_losses(trainer, twin, before)
    assert losses(trainer) == pytest.approx(expected, abs=2e-4)
    assert expected[0] == pytest.approx(0.6931, abs=1e-4) and max(expected[1:]) - min(expected[1:]) > 1e-3
    torch.testing.assert_close(logits(adapter), logits(twin), rtol=1e-2, atol=1e-3)
    if learned:
        with adapter.only(["ref"]):
            assert torch.equal(logits(adapter), logits(before))
        resumed = copy.deepcopy(before)
        again = own_dpo(tmp_path, resumed, max_steps=6, beta=0.1)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert again.state.global_step == 6
    with adapter.disable_adapter():
        assert torch.equal(logits(adapter), logits(tiny_model("llama")))


def test_another_reference_model_is_used_as_given(tmp_path: Path) -> None:
    arguments = trl.DPOConfig(**settings(tmp_path, max_steps=2, precompute_ref_log_probs=False))
    reference = tiny_model("llama")
    trainer = VeraDPOTrainer(
        own_model(), reference, args=arguments, train_dataset=preferences(), processing_class=tiny_tokenizer()
    )
    trainer.train()
    own = own_dpo(tmp_path / "own", max_steps=2)
    own.train()
    assert losses(trainer) == pytest.approx(losses(own), abs=1e-6)
    ahead = own_dpo(tmp_path / "ahead", max_steps=2, precompute_ref_log_probs=True)
    ahead.train()
    assert losses(ahead) == pytest.approx(losses(own), abs=1e-5)


def test_what_is_no_vera_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="VeraSFTTrainer trains a VeraModel, not a LlamaForCausalLM"):
        VeraSFTTrainer(tiny_model("llama"), trl.SFTConfig(**settings(tmp_path)), train_dataset=texts())
    with pytest.raises(TypeError, match="VeraDPOTrainer trains a VeraModel, not a LlamaForCausalLM"):
        VeraDPOTrainer(tiny_model("llama"), args=trl.DPOConfig(**settings(tmp_path)), train_dataset=preferences())


# Through the peft package: TRL's own trainers


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_own_trainers_take_the_plug_ins_configuration(kind: str, tmp_path: Path) -> None:
    whole = peft_trainer(kind, tmp_path / "whole", config=vera_config())
    assert isinstance(whole.model, peft.PeftModel)
    assert any(isinstance(module, TunedLayer) for module in whole.model.modules())
    assert kind == "sft" or whole.ref_model is None
    whole.train()
    interrupted = peft_trainer(kind, tmp_path / "parts", config=vera_config())
    interrupted.add_callback(StopAt(4))
    interrupted.train()
    resumed = peft_trainer(kind, tmp_path / "parts", config=vera_config())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert losses(resumed) == losses(whole)
    expected = logits(whole.model)
    assert torch.equal(logits(resumed.model), expected)
    whole.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(expected, logits(tiny_model("llama")))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_both_ways_learn_the_same(kind: str, tmp_path: Path) -> None:
    through_peft = peft_trainer(kind, tmp_path / "peft", config=vera_config(), max_steps=4)
    through_peft.train()
    own = (own_sft if kind == "sft" else own_dpo)(tmp_path / "own", max_steps=4)
    own.train()
    assert losses(own) == pytest.approx(losses(through_peft), rel=1e-4)


def test_dpo_of_a_trained_peft_model_compares_with_the_reference_it_is_given(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny_model("llama"), vera_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".vera_lambda_b" in name:
                parameter.normal_(std=0.3)
    before = logits(model)
    reference = copy.deepcopy(model).merge_and_unload()
    trainer = peft_trainer("dpo", tmp_path, model=model, max_steps=3, lr_scheduler_type="constant", ref_model=reference)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    assert not torch.allclose(logits(trainer.model), before)
