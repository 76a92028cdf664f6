"""Names of adapters."""

import pytest

from small_net import FIRST_LAYER, small_net
from veratune import VeraConfig, get_peft_model


@pytest.mark.parametrize("name", ["_keys", "_parameters", "training", "_version"])
def test_names_that_containers_use(name):
    with pytest.raises(ValueError, match="Module uses this name"):
        get_peft_model(small_net(), VeraConfig(**FIRST_LAYER), adapter_name=name)
