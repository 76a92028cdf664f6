import json

import pytest
import torch

from veratune import calibrate
from veratune.ops import calibration as profiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VERATUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(profiles, "_profiles", {})


def test_a_calibration_is_kept_and_found_again(monkeypatch):
    default = profiles.device_profile(CPU, torch.float32)
    measured = calibrate("cpu", (torch.float32,))[torch.float32]
    assert measured.flops > 1e8
    assert measured.bandwidth > 1e7
    assert 0 < measured.launch < 1
    assert profiles.device_profile(CPU, torch.float32) == measured != default
    assert profiles.device_profile(CPU, torch.bfloat16) != measured
    monkeypatch.setattr(profiles, "_profiles", {})
    assert profiles.device_profile(CPU, torch.float32) == default
    profiles.load_calibration(CPU)
    assert profiles.device_profile(CPU, torch.float32) == measured


def test_a_calibration_of_another_machine_does_not_count(monkeypatch):
    calibrate("cpu", (torch.float32,))
    monkeypatch.setattr(profiles, "_profiles", {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 977)
    profiles.load_calibration(CPU)
    assert profiles._profiles == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"x": 1}', '{"x": {"flops": -1}}', '{"x": {"flops": "a"}}']
)
def test_a_damaged_file_leaves_the_defaults(content):
    profiles.calibration_path().write_text(content)
    profiles.load_calibration(CPU)
    assert profiles._profiles == {}
    calibrate("cpu", (torch.float32,))
    assert len(json.loads(profiles.calibration_path().read_text())) == 1


def test_other_devices_have_defaults():
    assert profiles.device_profile(torch.device("meta"), torch.float32).flops > 0
    assert profiles.device_profile(torch.device("cuda", 0), torch.bfloat16).itemsize == 2
