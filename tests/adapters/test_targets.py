import pytest
import torch
from torch import nn

from reference import randomise
from small_net import FIRST_LAYER, small_net
from tiny_models import llama, tiny_model
from veratune import TargetError, VeraConfig, get_peft_model
from veratune.adapters.coverage import supported
from veratune.adapters.plan import plan_adapter
from veratune.layers import SavedModule, VeraLayer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)
        self.dense = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.conv = nn.ConvTranspose1d(8, 8, 1)
        self.head = nn.Linear(8, 2)


def names(model, **settings):
    return [target.name for target in plan_adapter(model, VeraConfig(r=2, **settings)).targets]


def layer_names(*suffixes, layers=range(3)):
    return [f"layers.{i}.{suffix}" for i in layers for suffix in suffixes]


def test_names_match_whole_components():
    assert names(Stack(), target_modules=["query", "dense"]) == layer_names("query", "dense")
    assert names(Stack(), target_modules=["layers.1.query"]) == ["layers.1.query"]
    with pytest.raises(TargetError):
        names(Stack(), target_modules=["uery"])


def test_a_regular_expression_matches_the_whole_name():
    assert names(Stack(), target_modules=r"layers\.[02]\.(query|value)") == layer_names("query", "value", layers=(0, 2))
    with pytest.raises(TargetError, match="matches no module's full name"):
        names(Stack(), target_modules="query")


def test_all_linear_is_every_linear_layer():
    assert names(Stack(), target_modules="all-linear") == [*layer_names("query", "value", "dense"), "head"]


def test_exclusions():
    assert names(Stack(), target_modules="all-linear", exclude_modules=["dense", "head"]) == layer_names(
        "query", "value"
    )
    assert names(Stack(), target_modules=["query"], exclude_modules=r"layers\.0\..*") == layer_names(
        "query", layers=(1, 2)
    )


def test_layers_to_transform():
    assert names(Stack(), target_modules=["query"], layers_to_transform=1) == ["layers.1.query"]
    assert names(Stack(), target_modules=["query"], layers_to_transform=[0, 2], layers_pattern="layers") == layer_names(
        "query", layers=(0, 2)
    )
    with pytest.raises(TargetError, match=r"\[0, 1, 2\]"):
        names(Stack(), target_modules=["query"], layers_to_transform=[7])
    with pytest.raises(TargetError, match="layers_pattern"):
        names(Stack(), target_modules=["query"], layers_to_transform=[0], layers_pattern="blocks")


def test_rank_pattern():
    plan = plan_adapter(
        Stack(), VeraConfig(r=4, target_modules="all-linear", rank_pattern={"dense": 8, r"layers\.0\.query": 2})
    )
    ranks = {target.name: target.r for target in plan.targets}
    assert ranks["layers.0.query"] == 2
    assert ranks["layers.1.query"] == 4
    assert ranks["layers.2.dense"] == 8
    with pytest.raises(TargetError, match="densse"):
        names(Stack(), target_modules="all-linear", rank_pattern={"densse": 8})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["qurey"]}, ["qurey", "query (Linear)"]),
        ({"target_modules": ["query", "valeu"]}, ["valeu", "value (Linear)"]),
        ({"target_modules": ".*qurey"}, ["qurey", "query (Linear)"]),
        ({"target_modules": ["norm"]}, ["layers.0.norm", "LayerNorm", "query (Linear)"]),
        ({"target_modules": ["conv"]}, ["conv", "ConvTranspose1d", "not of a kind that VeRA adapts"]),
        ({"target_modules": ["zzz"]}, ["zzz", "modules called", "query (Linear)"]),
        ({"target_modules": ["query"], "modules_to_save": ["haed"]}, ["haed", "head (Linear)"]),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, ["trained in full", "modules_to_save"]),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, ["exclude_modules", "no module remains"]),
    ],
)
def test_errors_say_what_the_model_has_and_change_nothing(settings, expected):
    model = Stack()
    modules, flags = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, VeraConfig(r=2, **settings))
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_model_without_linear_layers():
    with pytest.raises(TargetError, match="no layer that VeRA can adapt"):
        names(nn.Sequential(nn.ReLU()), target_modules="all-linear")


def test_modules_that_cannot_be_adapted_beside_others_are_told():
    with pytest.warns(UserWarning, match="skipping conv: ConvTranspose1d"):
        assert names(Stack(), target_modules=r".*query|conv") == layer_names("query")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (["query", "conv"], "'conv' matches only.*ConvTranspose1d"),
        (["query", "layers"], "'layers' matches only.*ModuleList"),
    ],
)
def test_each_name_in_a_list_has_to_adapt_something(wanted, expected):
    with pytest.raises(TargetError, match=expected):
        names(Stack(), target_modules=wanted)
    with pytest.raises(TargetError, match="'head' matches only modules that are trained in full"):
        names(Stack(), target_modules=["query", "head"], modules_to_save=["head"])


def test_multihead_attention_is_adapted_where_it_reads_its_weights():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    attention = ["self_attn.in_proj_weight", "self_attn.out_proj"]
    assert names(model, target_modules="all-linear") == [*attention, "linear1", "linear2"]
    assert names(model, target_modules=["self_attn"]) == attention
    assert names(model, target_modules=["out_proj"]) == attention[1:]
    assert names(model, target_parameters=["in_proj_weight"]) == attention[:1]


@pytest.mark.parametrize("padding", [False, True])
def test_torchs_fused_encoder_layer_does_not_skip_adapters(padding):
    """In eval mode without gradients torch computes this layer in one call that reads the weights directly."""
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    model = get_peft_model(net, VeraConfig(r=4, target_modules="all-linear"))
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 4] = padding
    base = model(x, src_key_padding_mask=mask)
    for layer in model.vera_layers().values():
        nn.init.normal_(layer.vectors("default")["b"])
    expected = model(x, src_key_padding_mask=mask)
    assert not torch.allclose(expected, base)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[:, :4], expected[:, :4])
    marks = [layer.activation_relu_or_gelu for layer in net.layers]
    model.unload()
    assert marks == [0, 0]
    assert [layer.activation_relu_or_gelu for layer in net.layers] == [1, 1]
    assert not any("veratune" in name for layer in net.layers for name in vars(layer))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_layers_without_inputs_or_outputs_are_left_alone(shape):
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(*shape)
    assert names(nn.Sequential(empty, nn.Linear(2, 2)), target_modules="all-linear") == ["1"]
    with pytest.raises(TargetError, match=f"{shape[0]} inputs and {shape[1]} outputs"):
        names(nn.Sequential(empty), target_modules=["0"])


def test_a_bare_layer_is_its_own_target():
    model = get_peft_model(nn.Linear(3, 2), VeraConfig(r=2, target_modules="all-linear"))
    assert list(model.vera_layers()) == [""]
    assert model(torch.randn(1, 3)).shape == (1, 2)


def test_a_module_in_several_places_is_one_target_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared), nn.Linear(4, 4))
    adapted = get_peft_model(model, VeraConfig(r=2, target_modules="all-linear"))
    assert list(adapted.vera_layers()) == ["0", "3"]
    assert model[0] is model[2][0]
    assert isinstance(model[0], VeraLayer)
    assert adapted.unload() is model
    assert model[0] is model[2][0] is shared


# The model's own choices


def test_the_articles_example_trains_the_new_head():
    model = get_peft_model(tiny_model("bert"), VeraConfig(r=4, target_modules=["query", "value", "dense"]))
    shapes = {(layer.in_features, layer.out_features) for layer in model.vera_layers().values()}
    assert len(shapes) > 1
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert isinstance(model.classifier, SavedModule)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("vera_lambda" in name or "modules_to_save" in name for name in trainable)
    assert any("modules_to_save" in name for name in trainable)


def test_a_head_with_linear_layers_of_its_own_is_trained_in_full_not_adapted():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = get_peft_model(RobertaForSequenceClassification(config), VeraConfig(r=4, target_modules=["dense"]))
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert not any(name.startswith("classifier") for name in model.vera_layers())


def test_the_head_can_be_left_alone():
    model = get_peft_model(tiny_model("bert"), VeraConfig(r=4, target_modules=["query"], modules_to_save=[]))
    assert not any(isinstance(module, SavedModule) for module in model.modules())


def test_a_language_models_head_is_neither_adapted_nor_saved():
    for kind in ("gpt2", "llama", "t5", "mixtral"):
        model = get_peft_model(tiny_model(kind), VeraConfig(r=4, target_modules="all-linear"))
        assert model.peft_config["default"].modules_to_save == []
        assert not any("lm_head" in name for name in model.vera_layers())


def test_a_head_tied_by_hand_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embed.weight

    assert names(Tied(), target_modules="all-linear") == ["body"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bert", {"query", "value"}),
        ("gpt2", {"c_attn"}),
        ("llama", {"q_proj", "v_proj"}),
        ("mixtral", {"q_proj", "v_proj"}),
        ("t5", {"q", "v"}),
        ("vit", {"q_proj", "v_proj"}),
    ],
)
def test_built_in_choices(kind, expected):
    model = get_peft_model(tiny_model(kind), VeraConfig(r=4))
    assert {name.rsplit(".", 1)[-1] for name in model.vera_layers()} == expected
    assert set(model.peft_config["default"].target_modules) == expected


def test_unknown_models_fall_back_to_all_linear_with_a_notice():
    with pytest.warns(UserWarning, match="no built-in choice"):
        model = get_peft_model(Stack(), VeraConfig(r=2))
    assert list(model.vera_layers()) == [*layer_names("query", "value", "dense"), "head"]


def test_the_callers_configuration_is_not_changed():
    config = VeraConfig(r=4)
    before = config.to_dict()
    get_peft_model(tiny_model("bert"), config)
    assert config.to_dict() == before


@pytest.mark.parametrize("container", ["list", "sequential", "state"])
def test_modules_to_save_of_odd_kinds(container):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            parts = [Extra(8, 8) if container == "state" else nn.Linear(8, 8)]
            self.many = nn.ModuleList(parts) if container == "list" else nn.Sequential(*parts)

        def forward(self, x):
            return self.many[0](self.first(x))

    config = VeraConfig(r=2, target_modules=["first"], modules_to_save=["many"])
    if container == "sequential":
        assert get_peft_model(Holder(), config)(torch.randn(2, 8)).shape == (2, 8)
    else:
        with pytest.raises(TargetError, match="many"):
            get_peft_model(Holder(), config)


def test_layers_that_cannot_be_right_are_refused():
    with pytest.raises(TargetError, match="complex"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)), VeraConfig(**FIRST_LAYER))
    with pytest.raises(ValueError, match="lazy"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), VeraConfig(**FIRST_LAYER))


def test_exclusions_and_indices_that_match_nothing():
    with pytest.warns(UserWarning, match="exclude_modules"):
        get_peft_model(small_net(), VeraConfig(**FIRST_LAYER, exclude_modules=["zzz"]))
    stack = nn.Module()
    stack.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(TargetError, match=r"in layer 99.*\[0, 1\]"):
        get_peft_model(stack, VeraConfig(**FIRST_LAYER, layers_to_transform=[0, 99], layers_pattern="layers"))


@pytest.mark.parametrize("pattern", ["layer|h", "(layers)", "x|(layers)"])
def test_layer_patterns_with_groups_and_alternatives(pattern):
    stack = nn.Module()
    stack.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    config = VeraConfig(**FIRST_LAYER, layers_to_transform=[1], layers_pattern=pattern)
    if "layers" in pattern:
        assert list(get_peft_model(stack, config).vera_layers()) == ["layers.1.0"]
    else:
        with pytest.raises(TargetError, match=r"stacks are called \['layers'\]"):
            get_peft_model(stack, config)


def test_an_adapted_tied_head_can_be_tied_again():
    base = llama(tie_word_embeddings=True).eval()
    with pytest.warns(UserWarning, match="lm_head shares its weight"):
        model = get_peft_model(base, VeraConfig(r=4, target_modules=["lm_head"]))
    randomise(model)
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    base.tie_weights()
    assert base.lm_head.base_weight is base.model.embed_tokens.weight
    assert torch.equal(model(ids).logits, expected)


def test_a_name_in_place_of_a_list_is_told_from_a_regular_expression():
    model = nn.ModuleDict({"outer": nn.ModuleDict({"query": nn.Linear(3, 3)})})
    with pytest.raises(ValueError, match=r"To match the ends of module names, pass a list: \['query'\]"):
        get_peft_model(model, VeraConfig(r=2, target_modules="query"))
    with pytest.raises(ValueError, match='Did you mean "all-linear"'):
        get_peft_model(model, VeraConfig(r=2, target_modules="all_linear"))


@pytest.mark.parametrize("normalised", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_convolution_without_a_weight_of_its_own_is_refused_with_the_reason(normalised):
    base = nn.Sequential(normalised(nn.Conv1d(4, 4, 3)), nn.Linear(4, 4))
    assert "0" not in {info.name for info in supported(base) if info.by == "target_modules"}
    with pytest.raises(TargetError, match="0: its weight is computed from other parameters"):
        get_peft_model(base, VeraConfig(**FIRST_LAYER))
    assert list(get_peft_model(base, VeraConfig(r=4, target_modules="all-linear")).vera_layers()) == ["1"]
