"""timm's vision models, every weight that can be adapted at once: linear layers, convolutions, position tables.

They need timm, and with it torchvision, which have to fit the installed torch; where they are missing this is skipped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import randomise
from veratune import VeraConfig, VeraModel, get_peft_model, supported

timm = pytest.importorskip("timm")

MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8},
    "mixer_s32_224": {"img_size": 64},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "maxvit_rmlp_nano_rw_256": {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "cait_xxs24_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "poolformer_s12": {},
    "pvt_v2_b0": {"embed_dims": (8, 16, 30, 32), "depths": (1, 1, 1, 1)},
    "mobilevit_xxs": {"img_size": 64},
    "edgenext_xx_small": {},
    "levit_128s": {"img_size": 64},
    "regnetx_002": {},
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)},
}
# In evaluation LeViT computes its tables of biases once and keeps them, whatever becomes of the weights.
EXCLUDED = {"levit_128s": ".*attention_biases"}


def image(name: str) -> Tensor:
    size = MODELS[name].get("img_size", 64)
    size = size[0] if isinstance(size, tuple) else size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def base(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False, num_classes=5, **MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def everything(name: str, model: nn.Module) -> VeraConfig:
    table = supported(model)
    modules = [i.name.removesuffix(".weight") for i in table if i.by in ("all-linear", "target_modules")]
    parameters = [i.name for i in table if i.by == "target_parameters"]
    return VeraConfig(
        r=4,
        target_modules=modules,
        target_parameters=parameters or None,
        exclude_modules=EXCLUDED.get(name),
        modules_to_save=[],
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_a_vision_model(name: str, tmp_path: Path) -> None:
    table = supported(base(name))
    assert table.coverage() == 1.0, [info for info in table if not info.adaptable and info.kind != "vector"]
    model, x = get_peft_model(base(name), everything(name, base(name))), image(name)
    with torch.no_grad():
        before = base(name)(x)
        assert torch.equal(model(x), before)
    randomise(model, scale=0.1)
    vectors = {
        f"{layer}.{i}": v for layer, own in model.adapter_state("default").vectors.items() for i, v in own.items()
    }
    output = model(x)
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weighting).sum().backward()
    assert not [key for key, vector in vectors.items() if vector.grad is None or not bool((vector.grad != 0).any())]
    with torch.no_grad():
        expected = model(x)
        assert float((expected - before).abs().max()) > 1e-3 * float(before.abs().max())
        model.save_pretrained(tmp_path)
        assert torch.equal(VeraModel.from_pretrained(base(name), tmp_path)(x), expected)
        weights = {key: layer.base_weight.clone() for key, layer in model.vera_layers().items()}
        model.merge_adapter()
        assert float((model(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        model.unmerge_adapter()
        assert all(torch.equal(layer.base_weight, weights[key]) for key, layer in model.vera_layers().items())
