"""`install()` is what changes PEFT; importing the plug-in and making configurations does not."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

peft = pytest.importorskip("peft")

from veratune import VeraConfig, get_peft_model  # noqa: E402
from veratune.integrations.peft import VeratuneConfig, install  # noqa: E402

# Run in a process where nothing is installed yet; its arguments are directories of adapters.
SCRIPT = """
import inspect, sys
import peft, pytest
from torch import nn
from peft import mapping, peft_model
from peft.utils import PeftType

def snapshot():
    found = {"types": dict(PeftType.__members__), "values": dict(PeftType._value2member_map_)}
    found |= {name: dict(value) for name, value in vars(mapping).items() if name.isupper() and isinstance(value, dict)}
    found["functions"] = {name: value for name, value in vars(peft_model).items() if inspect.isfunction(value)}
    for kind in {peft.PeftModel, *peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}:
        found[kind.__name__] = dict(vars(kind))
    return found

def net():
    return nn.Sequential(nn.Linear(3, 4))

before = snapshot()
assert "VERA" in before["types"] and "VERATUNE" not in before["types"]
from veratune.integrations.peft import VeratuneConfig, install
message = r"call veratune\\.integrations\\.peft\\.install\\(\\) before creating or reading a VeratuneConfig"
for make in (VeratuneConfig, lambda: VeratuneConfig(r=2, target_modules=["0"])):
    with pytest.raises(RuntimeError, match=message):
        make()
for directory in sys.argv[1:]:
    with pytest.raises(RuntimeError, match=message):
        VeratuneConfig.from_pretrained(directory)
    model = net()
    with pytest.raises(KeyError, match="VERATUNE"):
        peft.PeftModel.from_pretrained(model, directory)
    assert type(model[0]) is nn.Linear
assert snapshot() == before

install()
installed = snapshot()
assert installed != before
for directory in sys.argv[1:]:
    assert VeratuneConfig.from_pretrained(directory).r == 2
    assert isinstance(peft.PeftModel.from_pretrained(net(), directory), peft.PeftModel)
model = peft.get_peft_model(net(), VeratuneConfig(r=2, target_modules=["0"]))
model.add_adapter("other", VeratuneConfig(r=3, target_modules=["0"]))
install()
assert snapshot() == installed
assert installed["PEFT_TYPE_TO_TUNER_MAPPING"][PeftType.VERA] is before["PEFT_TYPE_TO_TUNER_MAPPING"][PeftType.VERA]
install(replace_vera=True)
changed = snapshot()
assert changed.pop("PEFT_TYPE_TO_TUNER_MAPPING") != installed.pop("PEFT_TYPE_TO_TUNER_MAPPING")
assert changed == installed
"""


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_nothing_else_changes_peft_and_without_it_all_is_refused(tmp_path: Path) -> None:
    install()
    settings = {"r": 2, "target_modules": ["0"]}
    peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), VeratuneConfig(**settings)).save_pretrained(tmp_path / "plugin")
    get_peft_model(nn.Sequential(nn.Linear(3, 4)), VeraConfig(**settings)).save_pretrained(tmp_path / "native")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "plugin"), str(tmp_path / "native")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
