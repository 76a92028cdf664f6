"""Tiny models of many architectures of transformers: a table of name -> how to build one and how to call it.

Every model is seeded and in eval mode. Every parameter has random values that are neither zero nor all alike, so that
no layer is dead and nothing that is lost leaves the outputs as they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Unreached:
    """Adapted layers that the call does not come to, so that they cannot learn.

    Attributes:
        pattern: a regular expression for their whole names; "name[3]" is the fourth matrix of a stack.
        reason: why they are not reached.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model of an architecture and how to call it.

    Attributes:
        kind: what sort of model it is.
        make: makes the model, with transformers' own initial values.
        inputs: makes the arguments of one call.
        unreached: the adapted layers that the call does not come to; all others must learn.
        fails: the checks that are known to fail, and why.
    """

    kind: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    unreached: tuple[Unreached, ...] = field(default=())
    fails: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Return the model; equal bits at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            model = self.make().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    _enliven(parameter)
        return model


def _enliven(parameter: Tensor) -> None:
    """Move a parameter from its initial value, which may be zero, one or so small that what follows is lost."""
    if not parameter.is_floating_point():
        return
    noise = torch.randn_like(parameter)
    if parameter.ndim < 2:
        parameter.add_(noise, alpha=0.1)
    elif parameter.numel() > 1 and parameter.std() < 0.1:
        fan_in = parameter[0].numel() if parameter.ndim > 2 else parameter.shape[-1]
        parameter.add_(noise, alpha=min(0.5, 1.5 * fan_in**-0.5))
    else:
        parameter.add_(noise, alpha=0.02)


def call(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all outputs of real numbers by name."""
    found: dict[str, Tensor] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found[name] = value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                collect(f"{name}.{key}", part)
        elif isinstance(value, list | tuple):
            for position, part in enumerate(value):
                collect(f"{name}.{position}", part)

    with torch.random.fork_rng():
        torch.manual_seed(4321)  # ViLT draws which patches it keeps
        collect("output", model(**inputs))
    return found


# Inputs


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(99)


def _ids(rows: int = 2, length: int = 7, seed: int = 99) -> Tensor:
    return torch.randint(5, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def text(length: int = 7, **more: Any) -> Inputs:
    """Two rows of tokens, of which the second ends in padding."""

    def make() -> dict[str, Any]:
        ids = _ids(length=length)
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask, **more}

    return make


def tokens(length: int = 7, **more: Any) -> Inputs:
    """Two rows of tokens without a mask."""
    return lambda: {"input_ids": _ids(length=length), **more}


def pairs(length: int = 7, **more: Any) -> Inputs:
    """Tokens for an encoder and for a decoder."""
    return lambda: {**text(length)(), "decoder_input_ids": _ids(length=5, seed=98), **more}


def image(size: int = 16, channels: int = 3, **more: Any) -> Inputs:
    """Two images."""
    return lambda: {"pixel_values": torch.randn(2, channels, size, size, generator=_seeded()), **more}


def video(frames: int, size: int = 16) -> Inputs:
    """Two short videos."""
    return lambda: {"pixel_values": torch.randn(2, frames, 3, size, size, generator=_seeded())}


def wave(samples: int = 800, **more: Any) -> Inputs:
    """Two waveforms."""
    return lambda: {"input_values": torch.randn(2, samples, generator=_seeded()), **more}


def spectrum(name: str, *shape: int, **more: Any) -> Inputs:
    """Two spectrograms under an argument's name."""
    return lambda: {name: torch.randn(2, *shape, generator=_seeded()), **more}


def both(*parts: Inputs, **more: Any) -> Inputs:
    """All of several inputs."""
    return lambda: {key: value for part in parts for key, value in part().items()} | more


# Models


def of(model: str, config: str | None = None, **settings: Any) -> Callable[[], nn.Module]:
    """A model by its class's name, from its configuration's class and settings."""

    def make() -> nn.Module:
        name = config or model.partition("For")[0].removesuffix("Model").removesuffix("LMHead") + "Config"
        made: nn.Module = getattr(transformers, model)(getattr(transformers, name)(**settings))
        return made

    return make


_VOCAB = {"vocab_size": 48, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {
    **_VOCAB,
    **_NO_DROPOUT,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_LLAMA = {
    **_VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}
_GPT2 = {**_VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
_BART = {
    **_VOCAB,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}
_T5 = {
    "vocab_size": 48,
    "pad_token_id": 2,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
}
_VIT = {
    **_NO_DROPOUT,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
_WAV = {
    **_VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
_CLIP_TEXT = {**_BERT, "projection_dim": 16}
_CLIP_VISION = {**_VIT, "projection_dim": 16}


def _dec(model: str, **settings: Any) -> Architecture:
    return Architecture("decoder", of(model, **{**_LLAMA, **settings}), text(use_cache=False))


def _enc(model: str, **settings: Any) -> Architecture:
    return Architecture("encoder", of(model, **{**_BERT, **settings}), text())


def _moe(model: str, **settings: Any) -> Architecture:
    return Architecture("mixture of experts", of(model, **{**_LLAMA, **settings}), text(16, use_cache=False))


def _ssm(model: str, **settings: Any) -> Architecture:
    return Architecture("state space", of(model, **{**_LLAMA, **settings}), text(use_cache=False))


def _vis(model: str, size: int = 16, **settings: Any) -> Architecture:
    return Architecture("vision", of(model, **settings), image(size))


def _s2s(model: str, **settings: Any) -> Architecture:
    return Architecture("encoder-decoder", of(model, **settings), pairs(use_cache=False))


_STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}


def but(architecture: Architecture, unreached: dict[str, str]) -> Architecture:
    """The same, with layers that the call does not come to, as patterns with reasons."""
    return replace(architecture, unreached=tuple(Unreached(*each) for each in unreached.items()))


ARCHITECTURES: dict[str, Architecture] = {
    # Encoders
    "bert": _enc("BertForSequenceClassification"),
    "roberta": _enc("RobertaForMaskedLM"),
    "xlm_roberta": _enc("XLMRobertaForTokenClassification"),
    "electra": _enc("ElectraForPreTraining", embedding_size=8),
    "albert": _enc("AlbertForMaskedLM", embedding_size=8),
    "distilbert": Architecture(
        "encoder",
        of(
            "DistilBertForSequenceClassification",
            **_VOCAB,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=40,
        ),
        text(),
    ),
    "deberta": _enc("DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": _enc(
        "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["c2p", "p2c"], conv_kernel_size=3
    ),
    "modernbert": _enc("ModernBertForMaskedLM", cls_token_id=0, sep_token_id=1),
    "mpnet": _enc("MPNetForMaskedLM"),
    "longformer": Architecture(
        "encoder",
        of("LongformerForMaskedLM", **_BERT, attention_window=4),
        text(global_attention_mask=torch.eye(2, 7, dtype=torch.int64)),
    ),
    "big_bird": but(
        _enc("BigBirdForMaskedLM", attention_type="original_full"),
        {"bert\\.pooler": "a masked language model does not use the pooled output"},
    ),
    "convbert": _enc("ConvBertForMaskedLM", embedding_size=16, head_ratio=1, conv_kernel_size=3),
    "squeezebert": but(
        _enc(
            "SqueezeBertForMaskedLM",
            embedding_size=16,
            **{f"{part}_groups": 2 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
        ),
        {"transformer\\.pooler\\.dense": "a masked language model does not use the pooled output"},
    ),
    "mobilebert": _enc("MobileBertForMaskedLM", embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    "fnet": but(
        Architecture("encoder", of("FNetForMaskedLM", **_BERT), tokens()),
        {"fnet\\.pooler\\.dense": "a masked language model does not use the pooled output"},
    ),
    "roformer": _enc("RoFormerForMaskedLM", config="RoFormerConfig", embedding_size=16),
    "ibert": _enc("IBertForMaskedLM"),
    "canine": but(
        Architecture(
            "encoder",
            of(
                "CanineForTokenClassification",
                **_BERT,
                num_hash_buckets=16,
                local_transformer_stride=8,
                downsampling_rate=4,
            ),
            text(16),
        ),
        {r"canine\.pooler\.dense": "token classification does not use the pooled output"},
    ),
    "xlnet": Architecture(
        "encoder",
        of("XLNetLMHeadModel", "XLNetConfig", vocab_size=48, d_model=16, n_layer=2, n_head=2, d_inner=24),
        text(),
    ),
    "nystromformer": _enc("NystromformerForMaskedLM", segment_means_seq_len=7, num_landmarks=7),
    "funnel": Architecture(
        "encoder",
        of("FunnelForMaskedLM", vocab_size=48, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=24),
        text(8),
    ),
    "esm": but(
        _enc("EsmForMaskedLM", mask_token_id=4, position_embedding_type="rotary"),
        {"esm\\.contact_head\\.regression": "only predict_contacts calls the contact head"},
    ),
    "perceiver": Architecture(
        "encoder",
        of(
            "PerceiverForMaskedLM",
            num_latents=4,
            d_latents=16,
            d_model=16,
            num_blocks=1,
            num_self_attends_per_block=1,
            num_self_attention_heads=2,
            num_cross_attention_heads=2,
            vocab_size=48,
            max_position_embeddings=8,
            qk_channels=16,
            v_channels=16,
        ),
        lambda: {"inputs": _ids(length=8)},
    ),
    "reformer": Architecture(
        "decoder",
        of(
            "ReformerModelWithLMHead",
            "ReformerConfig",
            vocab_size=48,
            hidden_size=16,
            num_attention_heads=2,
            attention_head_size=8,
            feed_forward_size=24,
            attn_layers=["local", "local"],
            local_attn_chunk_length=4,
            axial_pos_shape=(2, 4),
            axial_pos_embds_dim=(8, 8),
            max_position_embeddings=8,
            is_decoder=True,
        ),
        tokens(8, use_cache=False),
        fails={"training": "its reversible layers give no gradients if their input, the frozen embeddings, needs none"},
    ),
    # Decoders
    "gpt2": Architecture("decoder", of("GPT2LMHeadModel", "GPT2Config", **_GPT2), text(use_cache=False)),
    "gpt_bigcode": Architecture("decoder", of("GPTBigCodeForCausalLM", **_GPT2), text(use_cache=False)),
    "gpt_neo": Architecture(
        "decoder",
        of(
            "GPTNeoForCausalLM",
            **_VOCAB,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=40,
            window_size=4,
        ),
        text(use_cache=False),
    ),
    "gptj": Architecture("decoder", of("GPTJForCausalLM", **_GPT2, rotary_dim=4), text(use_cache=False)),
    "gpt_neox": _dec("GPTNeoXForCausalLM"),
    "codegen": Architecture(
        "decoder", of("CodeGenForCausalLM", **{**_GPT2, "n_embd": 32, "n_head": 4}, rotary_dim=4), text(use_cache=False)
    ),
    "opt": Architecture(
        "decoder",
        of(
            "OPTForCausalLM",
            **_VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=40,
            word_embed_proj_dim=8,
        ),
        text(use_cache=False),
    ),
    "bloom": Architecture(
        "decoder", of("BloomForCausalLM", **_VOCAB, hidden_size=16, n_layer=2, n_head=2), text(use_cache=False)
    ),
    "falcon": _dec("FalconForCausalLM"),
    "mpt": Architecture(
        "decoder",
        of("MptForCausalLM", vocab_size=48, d_model=16, n_heads=2, n_layers=2, max_seq_len=40, expansion_ratio=2),
        text(use_cache=False),
    ),
    "llama": _dec("LlamaForCausalLM"),
    "mistral": _dec("MistralForCausalLM", sliding_window=4),
    "qwen2": _dec("Qwen2ForCausalLM"),
    "qwen3": _dec("Qwen3ForCausalLM", head_dim=8),
    "gemma": _dec("GemmaForCausalLM", head_dim=8),
    "gemma2": _dec("Gemma2ForCausalLM", head_dim=8, sliding_window=4),
    "gemma3": Architecture(
        "decoder",
        of("Gemma3ForCausalLM", "Gemma3TextConfig", **_LLAMA, head_dim=8, sliding_window=4),
        text(use_cache=False),
    ),
    "gemma3n": Architecture(
        "decoder",
        of(
            "Gemma3nForCausalLM",
            "Gemma3nTextConfig",
            **{**_LLAMA, "intermediate_size": [24, 24], "num_hidden_layers": 2},
            head_dim=8,
            sliding_window=4,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=48,
            laurel_rank=4,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.5, 0.0],
            altup_num_inputs=2,
            layer_types=["sliding_attention", "full_attention"],
        ),
        text(use_cache=False),
    ),
    "phi": _dec("PhiForCausalLM"),
    "phi3": _dec("Phi3ForCausalLM"),
    "stablelm": _dec("StableLmForCausalLM"),
    "starcoder2": _dec("Starcoder2ForCausalLM"),
    "olmo2": _dec("Olmo2ForCausalLM"),
    "cohere": _dec("CohereForCausalLM"),
    "granite": _dec("GraniteForCausalLM"),
    "nemotron": _dec("NemotronForCausalLM"),
    "bitnet": _dec("BitNetForCausalLM"),
    "minicpm3": _dec(
        "MiniCPM3ForCausalLM",
        num_key_value_heads=2,
        **_MLA,
    ),
    "xglm": Architecture(
        "decoder",
        of(
            "XGLMForCausalLM",
            **_VOCAB,
            d_model=16,
            num_layers=2,
            attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=40,
        ),
        text(use_cache=False),
    ),
    "ctrl": Architecture(
        "decoder",
        of("CTRLLMHeadModel", "CTRLConfig", vocab_size=48, n_positions=40, n_embd=16, dff=24, n_layer=2, n_head=2),
        text(use_cache=False),
    ),
    # Encoder-decoders
    "t5": _s2s("T5ForConditionalGeneration", **_T5),
    "umt5": _s2s("UMT5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu"),
    "longt5": _s2s(
        "LongT5ForConditionalGeneration",
        **_T5,
        local_radius=3,
        encoder_attention_type="transient-global",
        global_block_size=4,
    ),
    "bart": _s2s("BartForConditionalGeneration", **_BART),
    "mbart": _s2s("MBartForConditionalGeneration", **_BART),
    "pegasus": _s2s("PegasusForConditionalGeneration", **_BART),
    "marian": _s2s("MarianMTModel", config="MarianConfig", **_BART),
    "m2m_100": _s2s("M2M100ForConditionalGeneration", **_BART),
    "led": Architecture(
        "encoder-decoder",
        of(
            "LEDForConditionalGeneration",
            **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
            attention_window=4,
            max_encoder_position_embeddings=40,
            max_decoder_position_embeddings=40,
        ),
        pairs(use_cache=False, global_attention_mask=torch.eye(2, 7, dtype=torch.int64)),
    ),
    "prophetnet": _s2s(
        "ProphetNetForConditionalGeneration",
        **_VOCAB,
        hidden_size=16,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=40,
        ngram=2,
    ),
    # Mixtures of experts
    "mixtral": _moe("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _moe("Qwen2MoeForCausalLM", **_EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=16),
    "qwen3_moe": _moe("Qwen3MoeForCausalLM", **_EXPERTS, moe_intermediate_size=8, head_dim=8),
    "qwen3_next": _moe(
        "Qwen3NextForCausalLM",
        **_EXPERTS,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gpt_oss": _moe("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4),
    "deepseek_v2": _moe(
        "DeepseekV2ForCausalLM",
        num_key_value_heads=2,
        **_ROUTED,
        **_MLA,
        n_group=None,
        topk_group=None,
    ),
    "deepseek_v3": _moe(
        "DeepseekV3ForCausalLM",
        num_key_value_heads=2,
        **_ROUTED,
        **_MLA,
        n_group=1,
        topk_group=1,
    ),
    "olmoe": _moe("OlmoeForCausalLM", **_EXPERTS),
    "granitemoe": _moe("GraniteMoeForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": _moe("JetMoeForCausalLM", kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    "dbrx": Architecture(
        "mixture of experts",
        of(
            "DbrxForCausalLM",
            vocab_size=48,
            d_model=16,
            n_heads=2,
            n_layers=2,
            max_seq_len=40,
            attn_config={"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
        ),
        text(use_cache=False),
    ),
    "llama4": Architecture(
        "mixture of experts",
        of(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **{**_LLAMA, "intermediate_size": 8},
            intermediate_size_mlp=24,
            num_local_experts=2,
            num_experts_per_tok=1,
            head_dim=8,
            interleave_moe_layer_step=2,
        ),
        text(use_cache=False),
    ),
    "phimoe": _moe("PhimoeForCausalLM", router_jitter_noise=0.5, num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": _moe(
        "Glm4MoeForCausalLM",
        **_ROUTED,
        head_dim=8,
        n_group=1,
        topk_group=1,
    ),
    "ernie4_5_moe": _moe(
        "Ernie4_5_MoeForCausalLM",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=8,
        moe_layer_start_index=1,
        moe_num_shared_experts=1,
    ),
    "minimax": _moe("MiniMaxForCausalLM", num_local_experts=4, num_experts_per_tok=2, head_dim=8, block_size=4),
    "longcat_flash": but(
        _moe(
            "LongcatFlashForCausalLM",
            num_layers=1,
            num_key_value_heads=2,
            ffn_hidden_size=24,
            n_routed_experts=4,
            zero_expert_num=1,
            moe_topk=2,
            expert_ffn_hidden_size=8,
            **_MLA,
            head_dim=8,
        ),
        {"model\\.layers\\.0\\.mlp\\.experts\\.gate_up_proj\\[4\\]": "that expert returns its input unchanged"},
    ),
    "switch_transformers": Architecture(
        "mixture of experts",
        of(
            "SwitchTransformersForConditionalGeneration",
            **_T5,
            num_experts=2,
            expert_capacity=20,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_decoder_layers=2,
        ),
        pairs(use_cache=False),
    ),
    "nllb_moe": Architecture(
        "mixture of experts",
        of(
            "NllbMoeForConditionalGeneration",
            **_BART,
            num_experts=2,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            expert_capacity=20,
        ),
        pairs(use_cache=False),
    ),
    # State space and recurrent
    "mamba": Architecture(
        "state space",
        of("MambaForCausalLM", **_VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=8),
        text(use_cache=False),
    ),
    "falcon_mamba": Architecture(
        "state space",
        of("FalconMambaForCausalLM", **_VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=8),
        text(use_cache=False),
    ),
    "mamba2": Architecture(
        "state space",
        of(
            "Mamba2ForCausalLM",
            **_VOCAB,
            hidden_size=16,
            state_size=8,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=8,
            n_groups=2,
            chunk_size=4,
        ),
        text(use_cache=False),
    ),
    "jamba": _ssm(
        "JambaForCausalLM",
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "bamba": _ssm(
        "BambaForCausalLM",
        attn_layer_indices=[1],
        **_MAMBA2,
    ),
    "falcon_h1": _ssm(
        "FalconH1ForCausalLM",
        mamba_d_ssm=32,
        **_MAMBA2,
        head_dim=8,
    ),
    "granitemoehybrid": _ssm(
        "GraniteMoeHybridForCausalLM",
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
        **_MAMBA2,
    ),
    "zamba2": _ssm(
        "Zamba2ForCausalLM",
        num_key_value_heads=2,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=8,
        chunk_size=4,
        num_mem_blocks=1,
        adapter_rank=4,
        use_mamba_kernels=False,
    ),
    "nemotron_h": _ssm(
        "NemotronHForCausalLM",
        layers_block_type=["mamba", "moe", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=4,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
        use_mamba_kernels=False,
    ),
    "rwkv": Architecture(
        "state space",
        of(
            "RwkvForCausalLM",
            vocab_size=48,
            context_length=40,
            hidden_size=16,
            num_hidden_layers=2,
            intermediate_size=24,
        ),
        tokens(use_cache=False),
    ),
    "recurrent_gemma": _ssm(
        "RecurrentGemmaForCausalLM",
        lru_width=16,
        attention_window_size=4,
        head_dim=8,
        block_types=["recurrent", "attention"],
    ),
    "xlstm": Architecture(
        "state space",
        of(
            "xLSTMForCausalLM",
            "xLSTMConfig",
            vocab_size=48,
            hidden_size=32,
            num_blocks=2,
            num_heads=2,
            chunk_size=8,
            return_last_states=True,
            mode="inference",
        ),
        tokens(8, use_cache=False),
    ),
    "lfm2": _ssm("Lfm2ForCausalLM", layer_types=["conv", "full_attention"], block_multiple_of=8),
    # Vision
    "vit": _vis("ViTForImageClassification", **_VIT),
    "deit": _vis("DeiTForImageClassificationWithTeacher", **_VIT),
    "beit": _vis("BeitForImageClassification", **_VIT, use_relative_position_bias=True),
    "data2vec_vision": _vis("Data2VecVisionForImageClassification", **_VIT),
    "dinov2": _vis(
        "Dinov2ForImageClassification", **{k: v for k, v in _VIT.items() if k != "intermediate_size"}, mlp_ratio=2
    ),
    "dinov3_vit": _vis("DINOv3ViTModel", **_VIT, num_register_tokens=2),
    "ijepa": _vis("IJepaForImageClassification", **_VIT),
    "swin": _vis(
        "SwinForImageClassification",
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=2,
    ),
    "swinv2": _vis(
        "Swinv2ForImageClassification",
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=2,
    ),
    "convnext": _vis("ConvNextForImageClassification", size=32, **_STAGES),
    "convnextv2": _vis("ConvNextV2ForImageClassification", size=32, **_STAGES),
    "segformer": _vis(
        "SegformerForSemanticSegmentation",
        size=32,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_encoder_blocks=2,
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "resnet": _vis("ResNetForImageClassification", size=32, embedding_size=8, **_STAGES),
    "regnet": _vis("RegNetForImageClassification", size=32, embedding_size=8, **_STAGES, groups_width=8),
    "mobilenet_v2": _vis("MobileNetV2ForImageClassification", size=32, depth_multiplier=0.25, last_hidden_size=16),
    "efficientnet": _vis(
        "EfficientNetForImageClassification", size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320
    ),
    "mobilevit": _vis(
        "MobileViTForImageClassification",
        size=128,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 16],
        num_attention_heads=2,
        image_size=128,
        patch_size=2,
    ),
    "pvt": _vis(
        "PvtForImageClassification",
        size=32,
        image_size=32,
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 2, 2, 2],
        depths=[1, 1, 1, 1],
        mlp_ratios=[2, 2, 2, 2],
        sequence_reduction_ratios=[4, 2, 1, 1],
    ),
    "poolformer": _vis("PoolFormerForImageClassification", size=32, config="PoolFormerConfig", **_STAGES),
    "levit": _vis(
        "LevitForImageClassification",
        size=128,
        image_size=128,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "cvt": _vis("CvtForImageClassification", size=32, embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    "focalnet": _vis(
        "FocalNetForImageClassification",
        size=32,
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "hiera": _vis(
        "HieraForImageClassification",
        size=32,
        image_size=[32, 32],
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 2, 4],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        masked_unit_size=[4, 4],
        num_query_pool=2,
        query_stride=[2, 2],
        mlp_ratio=2.0,
    ),
    "vit_mae": Architecture(
        "vision",
        of(
            "ViTMAEForPreTraining",
            **_VIT,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
            mask_ratio=0.5,
        ),
        image(noise=torch.tensor([[0.3, 0.1, 0.9, 0.6], [0.7, 0.2, 0.1, 0.8]])),
    ),
    "yolos": _vis("YolosForObjectDetection", **{**_VIT, "image_size": [16, 16]}, num_detection_tokens=3),
    "dpt": _vis(
        "DPTForDepthEstimation",
        size=32,
        **{**_VIT, "image_size": 32},
        backbone_out_indices=[0, 1],
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[2, 1],
        fusion_hidden_size=8,
    ),
    "videomae": Architecture(
        "vision", of("VideoMAEForVideoClassification", **_VIT, num_frames=4, tubelet_size=2), video(4)
    ),
    "timesformer": Architecture("vision", of("TimesformerForVideoClassification", **_VIT, num_frames=2), video(2)),
    "sam": but(
        Architecture(
            "vision",
            lambda: transformers.SamModel(
                transformers.SamConfig(
                    vision_config={
                        "hidden_size": 16,
                        "output_channels": 8,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 2,
                        "image_size": 32,
                        "patch_size": 8,
                        "mlp_dim": 24,
                        "num_pos_feats": 4,
                        "window_size": 2,
                        "global_attn_indexes": [1],
                    },
                    prompt_encoder_config={
                        "hidden_size": 8,
                        "image_size": 32,
                        "patch_size": 8,
                        "mask_input_channels": 4,
                    },
                    mask_decoder_config={
                        "hidden_size": 8,
                        "mlp_dim": 16,
                        "num_attention_heads": 2,
                        "iou_head_hidden_dim": 8,
                    },
                )
            ),
            image(32, input_points=torch.tensor([[[[5.0, 9.0]]], [[[20.0, 3.0]]]])),
        ),
        {"mask_decoder\\.output_hypernetworks_mlps\\.0\\..*": "the first of several masks is dropped"},
    ),
    "detr": but(
        Architecture(
            "vision",
            lambda: transformers.DetrForObjectDetection(
                transformers.DetrConfig(
                    use_timm_backbone=False,
                    use_pretrained_backbone=False,
                    backbone=None,
                    backbone_config=transformers.ResNetConfig(embedding_size=8, **_STAGES, out_features=["stage4"]),
                    **{
                        k: v
                        for k, v in _BART.items()
                        if k.startswith(("d_model", "encoder", "decoder_l", "decoder_a", "decoder_f"))
                    },
                    num_queries=3,
                    num_labels=3,
                )
            ),
            image(64),
        ),
        {"model\\.decoder\\.layers\\.0\\.self_attn\\.[qkv]_proj": "the values are computed from zeros"},
    ),
    # Speech
    "whisper": Architecture(
        "speech",
        of(
            "WhisperForConditionalGeneration", **_BART, num_mel_bins=8, max_source_positions=20, max_target_positions=20
        ),
        spectrum("input_features", 8, 40, decoder_input_ids=_ids(length=5), use_cache=False),
    ),
    "wav2vec2": Architecture("speech", of("Wav2Vec2ForCTC", **_WAV), wave()),
    "wav2vec2_conformer": Architecture(
        "speech",
        of("Wav2Vec2ConformerForCTC", **_WAV, position_embeddings_type="relative", conv_depthwise_kernel_size=3),
        wave(),
    ),
    "wav2vec2_bert": Architecture(
        "speech",
        of("Wav2Vec2BertForCTC", **_WAV, feature_projection_input_dim=8, conv_depthwise_kernel_size=3),
        spectrum("input_features", 12, 8),
    ),
    "hubert": Architecture("speech", of("HubertForCTC", **_WAV), wave()),
    "wavlm": Architecture("speech", of("WavLMForCTC", **_WAV, num_buckets=16, max_bucket_distance=20), wave()),
    "unispeech_sat": Architecture("speech", of("UniSpeechSatForCTC", **_WAV), wave()),
    "data2vec_audio": Architecture(
        "speech", of("Data2VecAudioForCTC", **{**_WAV, "num_conv_pos_embeddings": 2}, conv_pos_kernel_size=3), wave()
    ),
    "sew": Architecture("speech", of("SEWForCTC", **_WAV, squeeze_factor=2), wave()),
    "sew_d": Architecture("speech", of("SEWDForCTC", **_WAV, squeeze_factor=2), wave()),
    "audio_spectrogram_transformer": Architecture(
        "speech",
        of(
            "ASTForAudioClassification",
            **{k: v for k, v in _VIT.items() if k != "image_size"},
            max_length=24,
            num_mel_bins=16,
            time_stride=8,
            frequency_stride=8,
        ),
        spectrum("input_values", 24, 16),
    ),
    "speech_to_text": Architecture(
        "speech",
        of(
            "Speech2TextForConditionalGeneration",
            **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
            input_feat_per_channel=8,
            input_channels=1,
            conv_channels=16,
            num_conv_layers=2,
            conv_kernel_sizes=(3, 3),
            max_source_positions=40,
            max_target_positions=20,
        ),
        spectrum("input_features", 24, 8, decoder_input_ids=_ids(length=5), use_cache=False),
    ),
    "moonshine": Architecture(
        "speech",
        of(
            "MoonshineForConditionalGeneration",
            **_VOCAB,
            hidden_size=16,
            intermediate_size=24,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
            decoder_start_token_id=0,
        ),
        wave(1600, decoder_input_ids=_ids(length=5), use_cache=False),
    ),
    # Multimodal
    "clip": Architecture(
        "multimodal",
        of("CLIPModel", text_config=_CLIP_TEXT, vision_config=_CLIP_VISION, projection_dim=16),
        both(text(), image()),
    ),
    "chinese_clip": Architecture(
        "multimodal",
        of("ChineseCLIPModel", text_config=_BERT, vision_config=_CLIP_VISION, projection_dim=16),
        both(text(), image()),
    ),
    "siglip": Architecture(
        "multimodal", of("SiglipModel", text_config=_BERT, vision_config=_VIT), both(text(), image())
    ),
    "blip": Architecture(
        "multimodal",
        of(
            "BlipForConditionalGeneration",
            text_config={**_BERT, "encoder_hidden_size": 16, "projection_dim": 16},
            vision_config=_CLIP_VISION,
            projection_dim=16,
        ),
        both(text(), image()),
    ),
    "flava": but(
        Architecture(
            "multimodal",
            of(
                "FlavaModel",
                text_config=_BERT,
                image_config=_VIT,
                multimodal_config=_BERT,
                hidden_size=16,
                projection_dim=16,
            ),
            both(text(), image()),
        ),
        {"(image|text)_projection": "only the contrastive loss of FlavaForPreTraining uses the projections"},
    ),
    "vilt": Architecture(
        "multimodal", of("ViltForQuestionAnswering", **_BERT, image_size=16, patch_size=8), both(text(), image())
    ),
    "visual_bert": Architecture(
        "multimodal",
        of("VisualBertForPreTraining", **_BERT, visual_embedding_dim=8),
        both(text(), lambda: {"visual_embeds": torch.randn(2, 3, 8, generator=_seeded())}),
    ),
    "git": Architecture(
        "multimodal", of("GitForCausalLM", vision_config=_VIT, **_BERT), both(text(), image(), use_cache=False)
    ),
    "layoutlm": but(
        Architecture(
            "multimodal",
            of("LayoutLMForTokenClassification", **_BERT, max_2d_position_embeddings=32),
            both(text(), lambda: {"bbox": torch.randint(0, 10, (2, 7, 4), generator=_seeded()).sort(-1).values}),
        ),
        {"layoutlm\\.pooler\\.dense": "token classification does not use the pooled output"},
    ),
    "owlvit": but(
        Architecture(
            "multimodal",
            of("OwlViTForObjectDetection", text_config=_BERT, vision_config=_VIT, projection_dim=16),
            both(text(), image()),
        ),
        {"owlvit\\.visual_projection": "the detector has separate heads for the image"},
    ),
    "clipseg": but(
        Architecture(
            "multimodal",
            of(
                "CLIPSegForImageSegmentation",
                text_config=_CLIP_TEXT,
                vision_config=_CLIP_VISION,
                projection_dim=16,
                extract_layers=[0, 1],
                reduce_dim=8,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=16,
            ),
            both(text(), image()),
        ),
        {"clip\\..*": "CLIP is run without gradients, and only the decoder learns"},
    ),
    "blip_2": Architecture(
        "multimodal",
        lambda: transformers.Blip2ForConditionalGeneration(
            transformers.Blip2Config(
                vision_config=_VIT,
                qformer_config={**_BERT, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
                text_config={
                    "model_type": "opt",
                    **_VOCAB,
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "ffn_dim": 24,
                    "max_position_embeddings": 40,
                    "word_embed_proj_dim": 16,
                },
                num_query_tokens=3,
                image_token_index=4,
            )
        ),
        both(
            image(),
            lambda: {
                "input_ids": torch.cat([torch.full((2, 3), 4), _ids()], 1),
                "attention_mask": torch.ones(2, 10, dtype=torch.int64),
            },
            use_cache=False,
        ),
    ),
    "llava": Architecture(
        "multimodal",
        lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config={"model_type": "clip_vision_model", **_CLIP_VISION},
                text_config={"model_type": "llama", **_LLAMA},
                image_token_index=4,
                vision_feature_layer=-1,
            )
        ),
        both(image(), lambda: {"input_ids": torch.cat([torch.full((2, 4), 4), _ids()], 1)}, use_cache=False),
    ),
    "paligemma": but(
        Architecture(
            "multimodal",
            lambda: transformers.PaliGemmaForConditionalGeneration(
                transformers.PaliGemmaConfig(
                    vision_config={"model_type": "siglip_vision_model", **_VIT},
                    text_config={"model_type": "gemma", **_LLAMA, "head_dim": 8},
                    image_token_index=4,
                    projection_dim=16,
                )
            ),
            both(image(), lambda: {"input_ids": torch.cat([torch.full((2, 4), 4), _ids()], 1)}, use_cache=False),
        ),
        {"model\\.vision_tower\\.head\\..*": "the language model reads the patches, not the pooled image"},
    ),
    "idefics3": Architecture(
        "multimodal",
        lambda: transformers.Idefics3ForConditionalGeneration(
            transformers.Idefics3Config(
                vision_config=_VIT,
                text_config={"model_type": "llama", **_LLAMA},
                image_token_id=4,
                scale_factor=2,
                pad_token_id=2,
            )
        ),
        lambda: {
            "pixel_values": torch.randn(2, 1, 3, 16, 16, generator=_seeded()),
            "input_ids": torch.cat([torch.full((2, 1), 4), _ids()], 1),
            "use_cache": False,
        },
    ),
    "mllama": Architecture(
        "multimodal",
        lambda: transformers.MllamaForConditionalGeneration(
            transformers.MllamaConfig(
                vision_config={
                    "hidden_size": 16,
                    "num_hidden_layers": 2,
                    "num_global_layers": 1,
                    "attention_heads": 2,
                    "intermediate_size": 24,
                    "vision_output_dim": 32,
                    "image_size": 16,
                    "patch_size": 8,
                    "max_num_tiles": 1,
                    "intermediate_layers_indices": [1],
                    "supported_aspect_ratios": [[1, 1]],
                },
                text_config={**_LLAMA, "cross_attention_layers": [1]},
            )
        ),
        lambda: {
            "input_ids": _ids(),
            "pixel_values": torch.randn(2, 1, 1, 3, 16, 16, generator=_seeded()),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.int64),
            "cross_attention_mask": torch.ones(2, 7, 1, 1, dtype=torch.int64),
            "use_cache": False,
        },
    ),
    # Others
    "patchtst": Architecture(
        "time series",
        of(
            "PatchTSTForPrediction",
            num_input_channels=2,
            context_length=16,
            patch_length=4,
            patch_stride=4,
            num_hidden_layers=2,
            d_model=16,
            num_attention_heads=2,
            ffn_dim=24,
            prediction_length=4,
        ),
        lambda: {"past_values": torch.randn(2, 16, 2, generator=_seeded())},
    ),
    "decision_transformer": Architecture(
        "reinforcement learning",
        of(
            "DecisionTransformerModel",
            state_dim=3,
            act_dim=2,
            hidden_size=16,
            max_ep_len=20,
            n_layer=2,
            n_head=2,
            n_positions=40,
            vocab_size=1,
        ),
        lambda: {
            "states": torch.randn(2, 4, 3, generator=_seeded()),
            "actions": torch.randn(2, 4, 2, generator=_seeded()),
            "rewards": torch.randn(2, 4, 1, generator=_seeded()),
            "returns_to_go": torch.randn(2, 4, 1, generator=_seeded()),
            "timesteps": torch.arange(4).repeat(2, 1),
            "attention_mask": torch.ones(2, 4),
        },
    ),
}
