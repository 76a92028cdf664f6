"""transformers' continuous batching with a bank: every request token for token what its adapter generates alone."""

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from tiny_models import llama, randomise_trainable
from veratune import VeraConfig, VeraModel, get_peft_model
from veratune.bank import AdapterBank, BankError
from veratune.integrations import continuous_batching
from veratune.integrations.continuous_batching import BankManager, generate_batch

QKV = ("q_proj", "k_proj", "v_proj")
ALL_LINEAR = ("all-linear",)
# Every setting that matters is small, so that requests wait for each other and prompts are split.
SMALL: dict[str, Any] = {"num_blocks": 24, "max_batch_tokens": 32, "page_size": 8, "max_requests_per_batch": 6}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def _llama(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return llama(max_position_embeddings=256, eos_token_id=None, attn_implementation=attention).eval()


def _config(targets: Sequence[str], **settings: Any) -> VeraConfig:
    named: Any = "all-linear" if tuple(targets) == ALL_LINEAR else list(targets)
    return VeraConfig(**{"r": 8, "target_modules": named, "modules_to_save": [], **settings})


def _adapted(seed: int, config: VeraConfig) -> VeraModel:
    model = get_peft_model(_llama(), config)
    randomise_trainable(model, seed)
    return model.eval()


@cache
def _models(targets: tuple[str, ...], saved: tuple[str, ...] = ()) -> dict[str | None, nn.Module]:
    """Return what each adapter is alone: of other ranks, projections and layers, where there are some to leave out."""
    config = _config(targets, modules_to_save=list(saved))
    return {
        None: _llama(),
        "a": _adapted(1, config),
        "b": _adapted(2, config),
        "small": _adapted(3, _config(targets, r=3, modules_to_save=list(saved))),
        "other key": _adapted(4, _config(targets, projection_prng_key=7)),
        "fewer layers": _adapted(5, _config(["q_proj"])),
    }


def _bank(
    targets: tuple[str, ...],
    names: Sequence[str | None] | None = None,
    attention: str = "sdpa",
    saved: tuple[str, ...] = (),
    **settings: Any,
) -> AdapterBank:
    bank = AdapterBank(_llama(attention), _config(targets, modules_to_save=list(saved)), **settings)
    for name, model in _models(targets, saved).items():
        if name is not None and (names is None or name in names):
            bank.add(name, model)
    return bank


def _alone(model: nn.Module, prompt: Sequence[int], tokens: int) -> list[int]:
    generate: Callable[..., torch.Tensor] = model.generate
    output = generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()


def _prompts(number: int, longest: int = 40, shortest: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(shortest, longest, (number,), generator=generator).tolist()
    return [torch.randint(3, 50, (length,), generator=generator).tolist() for length in lengths]


def _check_against_each_alone(
    bank: AdapterBank,
    models: dict[str | None, nn.Module],
    names: Sequence[str | None],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    generation: GenerationConfig | None = None,
    **settings: Any,
) -> list[GenerationOutput]:
    """Every sequence of every request, all in one batch, is what its adapter generates alone; no adapter stays held."""
    outputs = list(
        generate_batch(
            bank,
            prompts,
            adapters=names,
            max_new_tokens=tokens,
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(**(settings or SMALL)),
        ).values()
    )
    copies = 1 if generation is None else generation.num_return_sequences
    assert len(outputs) == copies * len(prompts)
    for i, output in enumerate(outputs):
        assert output.error is None
        assert output.generated_tokens == _alone(models[names[i // copies]], prompts[i // copies], tokens)
    assert _in_use(bank) == 0
    return outputs


def _in_use(bank: AdapterBank) -> int:
    return sum(version.leases for version in bank._registry.versions.values())


def _wait_for(manager: BankManager, request_id: str) -> list[int]:
    """Return the tokens of a request's last output; other outputs are lost."""
    while True:
        output = manager.get_result(timeout=1)
        assert output is not None or manager.is_running()
        if output is not None and output.request_id == request_id and output.is_finished():
            assert output.error is None
            return output.generated_tokens


# Right tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("targets", [QKV, ALL_LINEAR], ids=["qkv", "all-linear"])
def test_each_request_is_what_its_adapter_generates_alone(targets: tuple[str, ...], attention: str) -> None:
    models = _models(targets)
    bank = _bank(targets, attention=attention)
    names = [list(models)[i % len(models)] for i in range(30)]
    prompts = _prompts(30)
    outputs = _check_against_each_alone(bank, models, names, prompts, 15)
    assert [output.prompt_ids for output in outputs] == prompts
    # The adapters matter, or this would show nothing.
    assert len({tuple(_alone(model, prompts[0], 15)) for model in models.values()}) == len(models)
    assert bank.model.config._attn_implementation == attention


@pytest.mark.parametrize(("targets", "saved"), [(("q_proj", "lm_head"), ()), (QKV, ("lm_head",))])
@pytest.mark.parametrize("supported", [True, False], ids=["last tokens", "all tokens"])
def test_an_output_head_in_the_bank(
    targets: tuple[str, ...], saved: tuple[str, ...], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The head is given fewer tokens than the other layers if the model can do that.
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_logits_to_keep", lambda self: supported)
    models = _models(targets, saved)
    bank = _bank(targets, saved=saved)
    names = [list(models)[i % len(models)] for i in range(18)]
    _check_against_each_alone(bank, models, names, _prompts(18), 10)
    assert not bank.model.base_model.lm_head._forward_pre_hooks


def test_requests_that_are_thrown_out_of_the_cache_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    create = RequestState.create_equivalent_initial_request

    def counted(self: RequestState) -> RequestState:
        again.append(self.request_id)
        return create(self)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", counted)
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR)
    names = [list(models)[i % len(models)] for i in range(8)]
    prompts = _prompts(8, longest=10)
    small = {"num_blocks": 12, "max_batch_tokens": 64, "page_size": 8, "safety_margin": 0.0}
    _check_against_each_alone(bank, models, names, prompts, 40, **small)
    assert again


@pytest.mark.parametrize("num_blocks", [64, 14], ids=["all forks fit", "some begin anew"])
def test_several_sequences_of_a_request(num_blocks: int) -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR)
    names = ["a", None, "b", "small"]
    prompts = _prompts(4, longest=20, shortest=2)
    # Of the one likeliest token, sampling draws that.
    generation = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=20)
    small = {"num_blocks": num_blocks, "max_batch_tokens": 64, "page_size": 8}
    _check_against_each_alone(bank, models, names, prompts, 20, generation, **small)


def test_direct_calls_at_the_same_time() -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR)
    prompts = _prompts(6)
    batch = torch.tensor([(prompt * 8)[:8] for prompt in prompts[:2]])  # of tokens that differ, so that a mask matters
    calls = []
    with torch.no_grad():
        expected = bank.model(batch, adapters=["b", None]).logits
        with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
            manager.add_request(prompts[0], "long", max_new_tokens=60, adapter="a")
            while manager.get_result(timeout=0.001) is None:
                calls.append(bank.model(batch, adapters=["b", None]).logits)
            assert len(calls) > 10
            manager.add_request(prompts[0], "long", max_new_tokens=60, adapter="a")
            assert _wait_for(manager, "long") == _alone(models["a"], prompts[0], 60)
        calls.append(bank.model(batch, adapters=["b", None]).logits)
    for call in calls:  # where tensors lie in memory may change last bits, by no more than float32's default tolerance
        torch.testing.assert_close(call, expected)


def test_the_examples_of_the_document() -> None:
    document = Path(__file__).parents[2] / "docs" / "continuous-batching.md"
    several, coming = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    models = _models(QKV)
    bank = _bank(QKV, [])
    bank.add("anna", models["a"])
    bank.add("bert", models["b"])
    names: dict[str, Any] = {"bank": bank, "prompts": _prompts(3)}
    exec(several, names)
    for output, name, prompt in zip(names["outputs"].values(), ("a", "b", None), names["prompts"], strict=True):
        assert output.generated_tokens == _alone(models[name], prompt, 32)
    exec(coming, names)
    assert names["finished"] == {"first", "second"}
    assert _in_use(bank) == 0


# Sharing of blocks


def _one_after_the_other(bank: AdapterBank, prompt: list[int], names: Sequence[str | None]) -> list[list[int]]:
    with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
        return [_wait_for(manager, manager.add_request(prompt, max_new_tokens=12, adapter=name)) for name in names]


def test_adapters_do_not_share_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR)
    prompt = _prompts(1)[0][:1] * 3 + list(range(3, 33))
    names = ["a", "b", None, "a", "b"]
    expected = [_alone(models[name], prompt, 12) for name in names]
    assert _one_after_the_other(bank, prompt, names) == expected

    # transformers' own sharing, by tokens alone, gives later adapters the keys and values of the first.
    monkeypatch.setattr(BankManager, "_keep_apart", lambda self, cache: None)
    leaked = _one_after_the_other(bank, prompt, names)
    assert leaked[0] == expected[0]
    assert leaked[1] != expected[1]
    assert leaked[2] != expected[2]


@pytest.mark.parametrize("length", [7, 8, 9, 33])
def test_requests_of_one_adapter_do_share_blocks(length: int) -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR)
    bank.add("same as a", models["a"])
    prompt = list(range(3, 3 + length))
    matches: list[tuple[str, int]] = []
    manager = BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL))
    manager.warmup()  # makes the cache
    assert manager.batch_processor is not None
    cache = manager.batch_processor.cache
    search = cache.search_prefix_match

    def watched(request_id: str, prompt_ids: list[int]) -> int:
        matches.append((request_id, search(request_id, prompt_ids)))
        return matches[-1][1]

    cache.search_prefix_match = watched
    names = ["a", "b", "a", None, "same as a", "b", None]
    with manager:
        for i, name in enumerate(names):
            request_id = manager.add_request(prompt, str(i), max_new_tokens=10, adapter=name)
            assert _wait_for(manager, request_id) == _alone(models["a" if name == "same as a" else name], prompt, 10)
    shared = (length - 1) // 8 * 8
    assert matches == [("0", 0), ("1", 0), ("2", shared), ("3", 0), ("4", shared), ("5", shared), ("6", shared)]


def test_a_replaced_adapter_does_not_find_the_blocks_of_the_former() -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR, ["a"])
    prompt = list(range(3, 36))
    with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
        for model in (models["a"], models["b"], models["a"]):
            bank.add("a", model, replace=True)
            request_id = manager.add_request(prompt, max_new_tokens=12, adapter="a")
            assert _wait_for(manager, request_id) == _alone(model, prompt, 12)


# Adapters that come and go, requests that end


def test_adapters_replaced_and_removed_while_requests_run() -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR, ["a", "b"], capacity=2)
    prompts = _prompts(4)
    results: dict[str, list[int]] = {}
    with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
        manager.add_request(prompts[0], "old a", max_new_tokens=60, adapter="a", streaming=True)
        manager.add_request(prompts[1], "old b", max_new_tokens=60, adapter="b", streaming=True)
        streaming = set()
        while streaming != {"old a", "old b"}:
            output = manager.get_result(timeout=1)
            if output is not None:
                assert not output.is_finished()
                streaming.add(output.request_id)
        bank.add("a", models["small"], replace=True)  # the bank grows by this
        bank.remove("b")
        bank.add("c", models["other key"])
        with pytest.raises(BankError, match="no adapter 'b'"):
            manager.add_request(prompts[2], adapter="b")
        manager.add_request(prompts[2], "new a", max_new_tokens=20, adapter="a")
        manager.add_request(prompts[3], "c", max_new_tokens=20, adapter="c")
        while len(results) < 4:
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                assert output.error is None
                results[output.request_id] = output.generated_tokens
    assert results == {
        "old a": _alone(models["a"], prompts[0], 60),
        "old b": _alone(models["b"], prompts[1], 60),
        "new a": _alone(models["small"], prompts[2], 20),
        "c": _alone(models["other key"], prompts[3], 20),
    }
    assert _in_use(bank) == 0
    assert set(bank._registry.versions) == {bank.info("a").digest, bank.info("c").digest}


def test_a_cancelled_request_lets_go_of_its_adapter() -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR, ["a", "b"])
    prompts = _prompts(3)
    with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
        manager.add_request(prompts[0], "a", max_new_tokens=100, adapter="a", streaming=True)
        output = None
        while output is None:
            output = manager.get_result(timeout=1)
        digest = bank.info("a").digest
        bank.remove("a")
        assert digest in bank._registry.versions
        manager.cancel_request("a")
        manager.add_request(prompts[1], "b", max_new_tokens=10, adapter="b")  # is begun after that
        assert _wait_for(manager, "b") == _alone(models["b"], prompts[1], 10)
        assert not output.is_finished()
        assert digest not in bank._registry.versions
        assert _in_use(bank) == 0
        bank.add("a", models["small"])
        manager.add_request(prompts[2], "a", max_new_tokens=10, adapter="a")
        assert _wait_for(manager, "a") == _alone(models["small"], prompts[2], 10)


def test_cancelling_before_and_after_a_request_has_forked() -> None:
    models = _models(ALL_LINEAR)
    bank = _bank(ALL_LINEAR, ["a", "b"])
    prompts = _prompts(3, shortest=2)
    generation = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=30)
    manager = BankManager(bank, generation, ContinuousBatchingConfig(**SMALL))
    manager.add_request(prompts[0], "a", adapter="a")
    manager.cancel_request("a")  # nothing runs yet, so that it is never begun
    manager.add_request(prompts[1], "b", adapter="b", streaming=True)
    with manager:
        finished = {}
        cancelled = False
        while "b__child#0" not in finished:
            output = manager.get_result(timeout=1)
            if output is None:
                continue
            if output.is_finished():
                finished[output.request_id] = output.generated_tokens
            elif not cancelled and output.request_id == "b__child#0":
                manager.cancel_request("b")  # its child goes on
                cancelled = True
        assert cancelled
        assert finished["b__child#0"] == _alone(models["b"], prompts[1], 30)
    assert not manager._leases
    assert _in_use(bank) == 0


def test_a_request_that_fails_before_it_has_forked() -> None:
    bank = _bank(ALL_LINEAR, ["a"])
    generation = GenerationConfig(do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=5)
    with BankManager(bank, generation, ContinuousBatchingConfig(**SMALL)) as manager:
        manager.add_request([3, 4, 5], adapter="a", unheard_of=1)
        output = None
        while output is None:
            output = manager.get_result(timeout=1)
        assert output.error is not None
        assert "unheard_of" in output.error
        assert not manager._leases
    assert _in_use(bank) == 0


def test_a_bank_with_a_file_reads_adapters_for_requests(tmp_path: Path) -> None:
    models = _models(QKV)
    bank = _bank(QKV, ["a", "b", "small"], capacity=1, file=tmp_path / "bank")
    prompts = _prompts(3)
    with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
        for name, prompt in zip(("a", "b", "small"), prompts, strict=True):
            manager.add_request(prompt, name, max_new_tokens=10, adapter=name)
            assert _wait_for(manager, name) == _alone(models[name], prompt, 10)
        with manager.pause():
            manager.add_request(prompts[0], max_new_tokens=5, adapter="a")
            with pytest.raises(BankError, match="all 1 adapters"):
                manager.add_request(prompts[1], "waits", adapter="b")
    assert _in_use(bank) == 0


# What cannot be done


def test_requests_at_fault_are_refused_and_hold_nothing() -> None:
    bank = _bank(QKV, ["a"])
    manager = BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL))
    with pytest.raises(BankError, match="no adapter 'z'"):
        manager.add_request([3, 4], adapter="z")
    with pytest.raises(TypeError, match="adapter"):
        manager.add_request([3, 4])  # type: ignore[call-arg]
    with pytest.raises(BankError, match="input_ids is empty"):
        manager.add_request([], adapter="a")
    with pytest.raises(BankError, match="1 adapters for 2 inputs"):
        manager.add_requests([[3], [4]], adapters=["a"])
    with pytest.raises(BankError, match="no adapter 'z'"):
        manager.add_requests([[3], [4]], adapters=["a", "z"])
    assert manager.input_queue.empty()
    assert _in_use(bank) == 0
    manager.add_request([3, 4], "one", adapter="a")
    with pytest.raises(BankError, match="request_id='one'"):
        manager.add_request([3, 4], "one", adapter=None)
    assert _in_use(bank) == 1
    manager.stop()  # it never began
    output = manager.get_result(timeout=1)
    assert output is not None
    assert output.error is not None
    assert _in_use(bank) == 0
    manager.destroy()
    with pytest.raises(BankError, match="no adapter 'z'"):
        generate_batch(bank, [[3]], adapters=["z"])
    assert generate_batch(bank, [], adapters=[]) == {}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hello", "one list of token ids"),
        ([1.5, 2.0], "one list of token ids"),
        ([[3, 4]], "one list of token ids"),
        (torch.tensor([[3, 4]]), "one list of token ids"),
        (None, "one list of token ids"),
        ([3, 50], "50 is not a token id of this model, which has 50"),
        ([-1, 3], "-1 is not a token"),
    ],
)
def test_what_is_no_prompt_does_not_end_the_requests_of_others(prompt: Any, message: str) -> None:
    bank = _bank(QKV, ["a"])
    good = _prompts(1)[0]
    with BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL)) as manager:
        manager.add_request(good, "good", max_new_tokens=10, adapter="a")
        with pytest.raises(BankError, match=message):
            manager.add_request(prompt, adapter="a")
        with pytest.raises(BankError, match=message):
            manager.add_requests([good, prompt], adapters=["a", "a"])
        assert _wait_for(manager, "good") == _alone(_models(QKV)["a"], good, 10)
    with pytest.raises(BankError, match=message):
        generate_batch(bank, [prompt], adapters=["a"])
    assert _in_use(bank) == 0


def test_a_request_longer_than_the_cache_does_not_end_those_of_others() -> None:
    bank = _bank(QKV, ["a"])
    good = _prompts(1)[0]
    settings = ContinuousBatchingConfig(**SMALL)
    manager = BankManager(bank, continuous_batching_config=settings)
    early = manager.add_request([3] * 5000, adapter="a", max_new_tokens=2)  # nobody knows yet that it is too long
    with manager:
        output = manager.get_result(early, timeout=60)
        assert output is not None
        assert re.search(r"prompt of 5000 tokens .* the cache holds \d+", str(output.error))
        manager.add_request(good, "good", max_new_tokens=10, adapter="a")
        room = manager.batch_processor.cache.max_tokens_read
        with pytest.raises(BankError, match=f"the cache holds {room}"):
            manager.add_request([3] * room, adapter="a", max_new_tokens=2)
        with pytest.raises(BankError, match="increase the manager's num_blocks"):
            manager.add_request([3], adapter="a", max_new_tokens=room + 1)
        manager.add_request(([*good, 3, 4] * room)[: room - 3], "longest", max_new_tokens=4, adapter="a")
        assert _wait_for(manager, "good") == _alone(_models(QKV)["a"], good, 10)
        assert len(_wait_for(manager, "longest")) == 4
    assert _in_use(bank) == 0


def test_prompts_as_one_tensor() -> None:
    bank = _bank(QKV, ["a"])
    prompts = torch.tensor([_prompts(1)[0]] * 2)
    small = ContinuousBatchingConfig(**SMALL)
    outputs = generate_batch(
        bank, prompts, adapters=["a", None], max_new_tokens=6, continuous_batching_config=small
    ).values()
    for output, row, name in zip(outputs, prompts.tolist(), ("a", None), strict=True):
        assert output.generated_tokens == _alone(_models(QKV)[name], row, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph"),
        ({"use_cuda_graph": (False, True)}, "use_cuda_graph"),
        ({"use_async_batching": True}, "use_async_batching"),
        ({"varlen_compile_config": CompileConfig()}, "compil"),
        ({"default_compile_level": 1}, "compil"),
    ],
)
def test_settings_that_are_not_supported(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BankError, match=message):
        BankManager(_bank(QKV, ["a"]), continuous_batching_config=ContinuousBatchingConfig(**SMALL, **settings))


def test_a_prompt_that_transformers_cannot_fork_is_refused() -> None:
    bank = _bank(QKV, ["a"])
    generation = GenerationConfig(do_sample=True, num_return_sequences=2, max_new_tokens=2)
    with pytest.raises(BankError, match="num_return_sequences=2"):
        generate_batch(bank, [[3, 4], [3]], adapters=["a", "a"], generation_config=generation)
    # Its own loop ends by it, with all requests.
    outputs = _llama().generate_batch(
        [[3]], generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(**SMALL)
    )
    assert not [output for output in outputs.values() if output.error is None]


def test_beams_and_other_models_are_refused() -> None:
    bank = _bank(QKV, ["a"], attention="eager")
    with pytest.raises(BankError, match="num_beams=2"):
        BankManager(bank, GenerationConfig(num_beams=2))
    assert bank.model.config._attn_implementation == "eager"
    plain = AdapterBank(nn.Sequential(nn.Linear(4, 4)), VeraConfig(r=2, target_modules=["0"], modules_to_save=[]))
    with pytest.raises(BankError, match="Sequential does not support continuous batching"):
        BankManager(plain)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_the_models_own_entry_points_name_those_to_use(name: str) -> None:
    with pytest.raises(AttributeError, match=r"veratune\.integrations\.continuous_batching"):
        getattr(_bank(QKV, ["a"]).model, name)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_model_fails_all_requests_and_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = _bank(QKV, ["a"])

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("out of order")

    monkeypatch.setattr(bank.model.base_model.model.layers[1], "forward", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        generate_batch(
            bank,
            _prompts(10),
            adapters=["a"] * 10,
            max_new_tokens=5,
            continuous_batching_config=ContinuousBatchingConfig(**SMALL),
        )
    assert _in_use(bank) == 0


def test_an_error_inside_the_with_statement_ends_all_requests() -> None:
    bank = _bank(QKV, ["a"])
    manager = BankManager(bank, continuous_batching_config=ContinuousBatchingConfig(**SMALL))

    def fail() -> None:
        with manager:
            manager.add_requests(_prompts(10), adapters=["a"] * 10, max_new_tokens=200)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not manager.is_running()
    assert _in_use(bank) == 0
    with pytest.raises(RuntimeError, match="not added"):
        manager.add_request([3], adapter="a")
    assert _in_use(bank) == 0


def _executed() -> None:
    spec = importlib.util.spec_from_file_location("anew", str(continuous_batching.__file__))
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_another_version_of_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an import statement finds may be another object than the one imported above.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.99.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.23, not 5\.99\.1: pip install"):
        _executed()


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'veratune\[hf\]'"):
        _executed()
