"""A field is added to a configuration by one line in `config.py`, and all that lists fields has it.

The line is added to a copy of the package, which a process of its own imports.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import veratune

_FIELD = '    toy: int = setting(3, check.integer(range(1, 10), "an integer from 1 to 9"), peft="vera", card=True)\n'
_BEFORE = "    memory: MemoryName = setting("

_SCRIPT = """
import json
import sys
from pathlib import Path

import peft
import torch
from torch import nn

import veratune
from veratune.cli.inspecting import inspect
from veratune.cli.train.settings import SettingsError, TrainSettings
from veratune.integrations.peft import VeratuneConfig, install

there = Path(sys.argv[1])
assert Path(veratune.__file__).is_relative_to(there)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


for value, error in ((10, ValueError), ("3", TypeError)):
    try:
        veratune.VeraConfig(toy=value)
    except error as raised:
        assert f"toy={value!r} is not allowed: it must be an integer from 1 to 9" in str(raised)
    else:
        raise AssertionError("not checked")

config = veratune.VeraConfig(r=2, target_modules=["0"], toy=5)
veratune.get_peft_model(model(), config).save_pretrained(there / "native")
assert veratune.VeraModel.from_pretrained(model(), there / "native").peft_config["default"].toy == 5

install()
plugin = peft.get_peft_model(model(), VeratuneConfig(r=2, target_modules=["0"], toy=6))
plugin.save_pretrained(there / "plugin")
assert peft.PeftModel.from_pretrained(model(), there / "native").peft_config["default"].toy == 5
assert peft.PeftModel.from_pretrained(model(), there / "plugin").peft_config["default"].toy == 6
assert veratune.VeraModel.from_pretrained(model(), there / "plugin").peft_config["default"].toy == 6

settings = TrainSettings(model="m", data="d", output="o", vera={"toy": 4})
assert settings.vera["toy"] == 4 and settings.vera_config().toy == 4
try:
    TrainSettings(model="m", data="d", output="o", vera={"toy": 0})
except SettingsError as raised:
    assert "toy=0" in str(raised)
else:
    raise AssertionError("not checked")

shared = veratune.VeraConfig(r=2, target_modules=["0"], toy=7, projection="peft")
veratune.get_peft_model(model(), shared).export_peft(there / "exported")
assert json.loads((there / "exported" / "adapter_config.json").read_text())["toy"] == 7
assert veratune.VeraModel.from_pretrained(model(), there / "exported").peft_config["default"].toy == 7

inspect(str(there / "native"), as_json=True)
"""


def test_a_field_added_in_one_place_is_known_everywhere(tmp_path):
    shutil.copytree(Path(veratune.__file__).parent, tmp_path / "veratune", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "veratune" / "config.py"
    before, line, after = file.read_text(encoding="utf-8").partition(_BEFORE)
    assert line
    file.write_text(before + _FIELD + line + after, encoding="utf-8")
    (tmp_path / "script.py").write_text(_SCRIPT, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py", str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["config"]["toy"] == 5
    assert "| `toy` | `5` |" in (tmp_path / "native" / "README.md").read_text(encoding="utf-8")
