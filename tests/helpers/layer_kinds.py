from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from reference import randomise
from veratune import VeraConfig, VeraModel, get_peft_model

_MOE = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = make().eval()
            if isinstance(model, transformers.PreTrainedModel):
                model.config._experts_implementation = "eager"  # grouped products know no float64
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.any():
                        parameter.normal_(std=0.2)
            return model

    return made


@seeded
def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_MOE, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


@seeded
def wide_mixtral() -> nn.Module:
    # Grouped products want rows of a multiple of 16 bytes, in bfloat16 as well.
    settings = {**_MOE, "hidden_size": 16, "intermediate_size": 8}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=2)
    )


@seeded
def qwen_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **_MOE, intermediate_size=10, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=6
    )
    return transformers.Qwen3MoeForCausalLM(config)


@seeded
def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **_MOE, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2, head_dim=6
    )
    return transformers.GptOssForCausalLM(config)


@seeded
def llama4() -> nn.Module:
    settings = {**_MOE, "intermediate_size": 8, "intermediate_size_mlp": 14, "num_local_experts": 4, "head_dim": 6}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**settings))


IDS = torch.tensor([[3, 17, 5, 9, 21, 30, 2], [1, 4, 8, 11, 38, 7, 7]])


def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=IDS, use_cache=False).logits
    return output


def adapted(make: Callable[[], nn.Module], **settings: Any) -> VeraModel:
    model = get_peft_model(make(), VeraConfig(**{"r": 3, "target_modules": "all-linear", **settings}))
    torch.manual_seed(2)
    randomise(model, scale=0.4)
    return model


class Attention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        output: Tensor = self.attn(query, memory, memory)[0]
        return output


class Table(nn.Module):
    def __init__(self, rows: int = 30) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 5, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.table(ids)
        return output
