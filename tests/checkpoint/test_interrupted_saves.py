"""Saving that fails halfway leaves the old files, or files that are refused."""

import pytest
import torch

from small_net import small_adapted, small_inputs, small_net
from veratune import CheckpointError, VeraModel


def test_a_native_save_interrupted_over_a_peft_export(tmp_path):
    model, x = small_adapted(), small_inputs(3)
    model.export_peft(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(config)  # killed before the second file
    with pytest.warns(UserWarning, match="differs"):
        loaded = VeraModel.from_pretrained(small_net(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(x), model(x))


def test_an_export_interrupted_between_its_files_is_refused_by_all(tmp_path, monkeypatch):
    import peft

    from veratune.checkpoint import files

    (tmp_path / "folder").mkdir()  # so that directories cannot be exchanged
    small_adapted(projection="peft").export_peft(tmp_path)
    original = files.Path.replace
    replaced = []

    def killed_before_the_second(self, target):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(target)
        return original(self, target)

    monkeypatch.setattr(files.Path, "replace", killed_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        small_adapted(projection="peft", projection_prng_key=1, r=3).export_peft(tmp_path)
    monkeypatch.undo()
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError):
        VeraModel.from_pretrained(small_net(), tmp_path)
    with pytest.raises(Exception, match="adapter_config"):
        peft.PeftModel.from_pretrained(small_net(), str(tmp_path))


def test_an_export_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    small_adapted(projection="peft").export_peft(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    for export in ("export_peft", "export_lora"):
        with pytest.raises(OSError, match="No space left"):
            getattr(small_adapted(projection="peft", projection_prng_key=1), export)(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
