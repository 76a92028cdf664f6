import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reference import randomise
from veratune import CheckpointError, VeraConfig, VeraModel, get_peft_model
from veratune.checkpoint import hub, native
from veratune.projections.schemes import PerDimension

IN, HIDDEN, OUT = 6, 5, 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self, hidden=HIDDEN, out=OUT, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a = nn.Linear(IN, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.b = nn.Linear(hidden, hidden)
        self.head = nn.Sequential(nn.Linear(hidden, out))

    def forward(self, x):
        return self.head(self.b(self.norm(torch.tanh(self.a(x)))))


def trained(**settings):
    settings = {"r": 4, "target_modules": ["a", "b"], "modules_to_save": ["head"], **settings}
    model = get_peft_model(Net().eval(), VeraConfig(**settings))
    torch.manual_seed(1)
    randomise(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    return model.eval()


X = torch.randn(5, IN, generator=torch.Generator().manual_seed(9))

SETTINGS = [
    {},
    {"bias": "all"},
    {"bias": "vera_only"},
    {"rank_pattern": {"b": 9}},
    {"save_projection": True},
    {"projection": "peft"},
    {"projection": "peft", "save_projection": True},
    {"projection_prng_key": 2**64 - 1},
    {"projection_prng_key": -5},
    {"modules_to_save": ["head", "norm"]},
    {"vera_dropout": 0.1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("trainable", [True, False])
def test_round_trip(settings, trainable, tmp_path):
    model = trained(**settings)
    model.save_pretrained(tmp_path)
    fresh = Net()
    assert not torch.equal(fresh.eval()(X), model(X))
    loaded = VeraModel.from_pretrained(fresh, tmp_path, is_trainable=trainable).eval()
    assert torch.equal(loaded(X), model(X))
    changed = {"inference_mode", "modules_to_save"}
    ours, theirs = loaded.peft_config["default"].to_dict(), model.peft_config["default"].to_dict()
    assert {k: v for k, v in ours.items() if k not in changed} == {k: v for k, v in theirs.items() if k not in changed}
    assert any(p.requires_grad for p in loaded.parameters()) == trainable
    assert not any("base_layer.weight" in name and p.requires_grad for name, p in loaded.named_parameters())
    with loaded.disable_adapter():
        assert torch.equal(loaded(X), Net().eval()(X))


def test_the_file_holds_vectors_only(tmp_path):
    model = trained(modules_to_save=[])
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert shapes == {
        "vera_lambda_b.a": (HIDDEN,),
        "vera_lambda_d.a": (4,),
        "vera_lambda_b.b": (HIDDEN,),
        "vera_lambda_d.b": (4,),
    }


def test_saved_projections_are_the_ones_in_use(tmp_path):
    trained(modules_to_save=[], save_projection=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    a = PerDimension(0).draw("A", range(4), IN, torch.device("cpu"))
    b = PerDimension(0).draw("B", range(4), HIDDEN, torch.device("cpu"))
    assert torch.equal(tensors[f"projection.A.{IN}"], a)
    assert torch.equal(tensors[f"projection.B.{HIDDEN}"], b.t())


def test_several_adapters_have_folders_of_their_names(tmp_path):
    model = trained()
    model.add_adapter("other", VeraConfig(r=2, target_modules=["b"], modules_to_save=[], projection_prng_key=3))
    randomise(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    assert (tmp_path / "other" / WEIGHTS).is_file()
    loaded = VeraModel.from_pretrained(Net(), tmp_path).eval()
    loaded.load_adapter(tmp_path, "renamed", subfolder="other")
    assert loaded.active_adapters == ["default"]
    assert torch.equal(loaded(X), model(X))
    model.set_adapter(["default", "other"])
    loaded.set_adapter(["default", "renamed"])
    assert torch.equal(loaded(X), model(X))
    model.save_pretrained(tmp_path / "selected", selected_adapters=["other"])
    assert sorted(path.name for path in (tmp_path / "selected").iterdir()) == ["other"]


def test_an_adapter_called_like_a_module_keeps_all_its_vectors(tmp_path):
    model = trained(modules_to_save=[])
    for name in ("a", "b"):
        model.add_adapter(name, VeraConfig(r=2, target_modules=["a", "b"], modules_to_save=[]))
    randomise(model)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "a", tmp_path / "b"):
        assert len(load_file(folder / WEIGHTS)) == 4
    model.set_adapter("a")
    assert torch.equal(VeraModel.from_pretrained(Net(), tmp_path / "a").eval()(X), model(X))


def test_saving_again_replaces_and_leaves_other_files_alone(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("my card")
    randomise(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(VeraModel.from_pretrained(Net(), tmp_path).eval()(X), model(X))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "README.md").read_text() == "my card"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS, "notes.txt"]


def test_files_are_readable_as_the_umask_says(tmp_path):
    trained().save_pretrained(tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    for name in (WEIGHTS, CONFIG, "README.md"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_model_card(tmp_path):
    model = trained()
    model.peft_config["default"].base_model_name_or_path = "owner/name-1.0"
    model.save_pretrained(tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    front = text.split("---")[1]
    assert json.loads(front.split("base_model: ")[1].splitlines()[0]) == "owner/name-1.0"
    assert "adapts 2 layers with 18 trained parameters, and has 18 more in modules_to_save and biases" in text
    model.peft_config["default"].base_model_name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "local")
    assert str(tmp_path) not in (tmp_path / "local" / "README.md").read_text()
    for place in ("../models/x", "./x", "a/b/c", '"quoted"'):
        model.peft_config["default"].base_model_name_or_path = place
        model.save_pretrained(tmp_path / "local")
        assert place not in (tmp_path / "local" / "README.md").read_text()


def test_a_card_of_ours_is_renewed_and_a_changed_one_kept(tmp_path):
    trained().save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "| `r` | `4` |" in card.read_text()
    trained(r=9).save_pretrained(tmp_path)
    assert "| `r` | `9` |" in card.read_text()
    card.write_text(card.read_text().replace("# VeRA adapter", "# Mine"))
    trained().save_pretrained(tmp_path)
    assert "# Mine" in card.read_text()
    assert "| `r` | `9` |" in card.read_text()


def test_a_half_precision_base_and_back(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    half = VeraModel.from_pretrained(Net().bfloat16(), tmp_path)
    half.save_pretrained(tmp_path / "half")
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        if name.startswith("vera_lambda"):
            assert torch.equal(load_file(tmp_path / "half" / WEIGHTS)[name], tensor)


def test_saving_while_merged(tmp_path):
    model = trained()
    expected = model(X)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(VeraModel.from_pretrained(Net(), tmp_path).eval()(X), expected)


# What must be refused, with the model unchanged


def rewrite(path: Path, change) -> None:
    """Change a file's tensors and header, and give it a right checksum again, as a careful forger would."""
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        header = json.loads(handle.metadata()["veratune"])
    header.pop("sha256")
    change(tensors, header)
    header["sha256"] = native.digest_of(header, tensors)
    save_file(tensors, path, {"format": "pt", "veratune": json.dumps(header)})


def drop(name):
    return lambda tensors, header: tensors.pop(name)


def put(name, tensor):
    return lambda tensors, header: tensors.__setitem__(name, tensor)


def set_header(name, value):
    return lambda tensors, header: header.__setitem__(name, value)


def set_config(name, value):
    return lambda tensors, header: header["config"].__setitem__(name, value)


FORGERIES = [
    (drop("vera_lambda_d.a"), "has the vectors"),
    (drop("modules_to_save.head.0.weight"), r"missing 0\.weight"),
    (put("vera_lambda_b.zzz", torch.zeros(3)), "has the vectors"),
    (put("vera_lambda_b.a", torch.zeros(HIDDEN + 1)), r"shape \(6,\).*5 outputs"),
    (put("vera_lambda_b.a", torch.zeros(HIDDEN, 1)), "shape"),
    (put("vera_lambda_d.a", torch.zeros(2, 2)), "shape"),
    (put("vera_lambda_d.a", torch.zeros(0)), "shape"),
    (put("modules_to_save.head.0.weight", torch.zeros(OUT + 1, HIDDEN)), "number of labels"),
    (put("modules_to_save.head.9.weight", torch.zeros(1)), "has unexpected names"),
    (put("modules_to_save.other.weight", torch.zeros(1)), "does not belong to any of modules_to_save"),
    (put("bias.zzz.bias", torch.zeros(1)), "zzz.bias"),
    (put("bias.a.bias", torch.zeros(1)), "a.bias"),
    (put("something.else", torch.zeros(1)), "no known prefix"),
    (put("vera_lambda_b", torch.zeros(1)), "has the vectors|does not have"),
    (set_header("fingerprint", "0" * 16), "trained with other projections"),
    (set_config("projection_prng_key", 1), "trained with other projections"),
    (set_config("projection", "peft"), "trained with other projections|says r"),
    (set_header("format_version", 99), "format version 99"),
    (set_header("config", []), "damaged"),
    (set_config("r", -1), "r=-1"),
    (set_config("unknown_field", 1), "unknown_field"),
    (lambda tensors, header: tensors.clear(), "adapts no layer"),
]


def assert_refused(directory, match, net=None):
    """Loading into a bare model and beside another adapter fails, and both models are as before."""
    net = net or Net()
    net.a.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modules, flags = dict(net.named_modules()), [p.requires_grad for p in net.parameters()]
    with pytest.raises(CheckpointError, match=match):
        VeraModel.from_pretrained(net, directory)
    assert dict(net.named_modules()) == modules
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    model = trained(target_modules=["b"])
    expected, names = model(X), [name for name, _ in model.named_modules()]
    with pytest.raises(CheckpointError):
        model.load_adapter(directory, "second")
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(("change", "match"), FORGERIES)
def test_forged_files(change, match, tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()
    rewrite(tmp_path / WEIGHTS, lambda tensors, header: None)
    VeraModel.from_pretrained(Net(), tmp_path)
    rewrite(tmp_path / WEIGHTS, change)
    assert_refused(tmp_path, match)


def test_another_models_adapter(tmp_path):
    trained().save_pretrained(tmp_path)
    assert_refused_for_other = Net(hidden=HIDDEN + 2)
    with pytest.raises(CheckpointError, match="other dimensions"):
        VeraModel.from_pretrained(assert_refused_for_other, tmp_path)
    with pytest.raises(CheckpointError, match="does not have"):
        VeraModel.from_pretrained(nn.Sequential(nn.Linear(IN, HIDDEN)), tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.3, 0.9, -1])
def test_truncated_files(keep, tmp_path):
    trained().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    length = int(len(data) * keep) if isinstance(keep, float) else keep % len(data)
    (tmp_path / WEIGHTS).write_bytes(data[:length])
    assert_refused(tmp_path, "safetensors")


def test_any_changed_byte_is_noticed(tmp_path):
    trained().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    expected = VeraModel.from_pretrained(Net(), tmp_path).eval()(X)
    for position in random.Random(0).sample(range(len(data)), 200):
        changed = bytearray(data)
        changed[position] ^= 1 << random.Random(position).randrange(8)
        (tmp_path / WEIGHTS).write_bytes(changed)
        try:
            loaded = VeraModel.from_pretrained(Net(), tmp_path).eval()
        except CheckpointError:
            continue
        # Only white space and the "format" entry mean nothing.
        assert torch.equal(loaded(X), expected), position


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (WEIGHTS, b"PK\x03\x04 a pickle archive", "safetensors"),
        (CONFIG, b"{", "JSON"),
        (CONFIG, b"[1]", "JSON object"),
        (CONFIG, b"\xff\xfe", "JSON"),
        (CONFIG, b"[" * 100000, "JSON"),
    ],
)
def test_foreign_files(name, content, match, tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path, match)


def test_a_safetensors_file_of_somebody_else(tmp_path):
    trained().save_pretrained(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / WEIGHTS)
    assert_refused(tmp_path, "not written by veratune")


def test_missing_files(tmp_path):
    assert_refused(tmp_path, "does not exist")
    assert_refused(tmp_path / "nowhere" / "deep" / "down", "neither a local directory nor")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", "is a file")
    trained().save_pretrained(tmp_path)
    (tmp_path / CONFIG).unlink()  # the tensors file is whole without it
    VeraModel.from_pretrained(Net(), tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert_refused(tmp_path, "does not exist")


def test_a_hub_name_without_a_network(tmp_path):
    with pytest.raises(CheckpointError, match="owner/name is not a local directory"):
        VeraModel.from_pretrained(Net(), "owner/name", cache_dir=tmp_path)


@pytest.mark.parametrize("subfolder", ["..", "../other", "a/../../b", "/etc", "..\\x", "C:\\x"])
def test_a_path_out_of_the_directory(subfolder, tmp_path):
    trained().save_pretrained(tmp_path / "inside")
    trained().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="must stay inside"):
        VeraModel.from_pretrained(Net(), tmp_path / "inside", subfolder=subfolder)


def test_a_json_that_was_edited_by_hand_is_told_and_does_not_count(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(values | {"r": 8, "projection_prng_key": 7}))
    with pytest.warns(UserWarning, match=r"\['r', 'projection_prng_key'\]"):
        loaded = VeraModel.from_pretrained(Net(), tmp_path).eval()
    assert torch.equal(loaded(X), model(X))


def test_saving_what_does_not_exist(tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="'nobody' does not exist"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="no adapter to save"):
        model.save_pretrained(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    model = trained()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    randomise(model)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLER = """
import os, random, signal, sys, time, warnings
import torch
from torch import nn
from veratune import VeraConfig, VeraModel, get_peft_model

torch.set_num_threads(1)
warnings.filterwarnings("ignore", "veratune.*differs from the configuration")
directory, chance, versions = sys.argv[1], random.Random(0), set()

def save_without_pause(first, saved):
    model = get_peft_model(nn.Sequential(nn.Linear(200, 300)), VeraConfig(r=64, target_modules=["0"]))
    b, d = model.base_model[0].vectors("default").values()
    for value in range(first, first + 10**6):
        with torch.no_grad():
            b.fill_(value), d.fill_(value)
        model.peft_config["default"].d_initial = float(value)
        model.save_pretrained(directory)
        os.write(saved, b".")

for round in range(80):
    saved = os.pipe()
    child = os.fork()
    if child == 0:
        save_without_pause(1 + 1000 * round, saved[1])
    os.read(saved[0], 1)  # at least once, however busy the machine is
    time.sleep(0.02 * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved[0]), os.close(saved[1])
    loaded = VeraModel.from_pretrained(nn.Sequential(nn.Linear(200, 300)), directory)
    b, d = (vector.detach() for vector in loaded.vera_layers()["0"].vectors("default").values())
    assert b.unique().numel() == d.unique().numel() == 1
    assert b[0] == d[0] == loaded.peft_config["default"].d_initial
    versions.add(int(b[0]))
print(len(versions))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_process_leaves_a_whole_adapter(tmp_path):
    """Kill processes that save without pause, many times; what they leave is always one whole version."""
    result = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 80


# The hub


def test_push_to_hub_uploads_the_adapters_files_only(monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = (repo_id, private, exist_ok)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, allow_patterns, **settings):
            folder = Path(folder_path)
            calls["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            calls["patterns"], calls["settings"] = allow_patterns, settings
            return type("Commit", (), {"commit_url": f"address/of/{repo_id}"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    model = trained()
    model.add_adapter("other", VeraConfig(r=2, target_modules=["b"], modules_to_save=[]))
    address = model.push_to_hub("owner/name", private=True, token="t", commit_message="first")
    assert address == "address/of/owner/name"
    assert calls["repo"] == ("owner/name", True, True)
    assert calls["settings"] == {"commit_message": "first"}
    names = sorted(["README.md", CONFIG, WEIGHTS])
    assert calls["files"] == sorted([*names, *(f"other/{name}" for name in names)])
    with pytest.raises(TypeError, match="colour"):
        model.push_to_hub("owner/name", colour="red")


@pytest.mark.parametrize(
    "place", ["./base", "/home/somebody/models/bert", "sub/folder/base", "my-base", "C:\\models\\bert"]
)
def test_push_to_hub_warns_of_a_private_path(place, monkeypatch, tmp_path):
    """A directory's path is kept in the configuration, as in PEFT's; the card never names it."""
    pushed = {}

    def upload(directory, repo_id, **settings):
        pushed.update({path.name: path.read_bytes() for path in directory.iterdir()})
        return "address"

    monkeypatch.setattr("veratune.model.upload_directory", upload)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-base").mkdir()  # would be a name on the hub otherwise
    model = trained()
    model.peft_config["default"].base_model_name_or_path = place
    with pytest.warns(UserWarning, match=re.escape(repr(place)) + r".*base_model_name_or_path to the model's name"):
        assert model.push_to_hub("owner/name") == "address"
    assert json.loads(pushed[CONFIG])["base_model_name_or_path"] == place
    assert place not in pushed["README.md"].decode() and "base_model:" not in pushed["README.md"].decode()
    for public in ("owner/base", "bert-base-uncased", None):
        model.peft_config["default"].base_model_name_or_path = public
        model.push_to_hub("owner/name")  # a warning would be an error
        assert place.encode() not in b"".join(pushed.values())
        assert (f'base_model: "{public}"' in pushed["README.md"].decode()) is (public is not None)


def test_from_pretrained_asks_the_hub_for_the_adapters_files_only(monkeypatch, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "snapshot" / "sub")
    asked = {}

    def snapshot_download(repo_id, **settings):
        asked.update(settings, repo_id=repo_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = VeraModel.from_pretrained(Net(), "owner/name", subfolder="sub", revision="v1", token="t").eval()
    assert torch.equal(loaded(X), model(X))
    assert asked["repo_id"] == "owner/name"
    assert asked["revision"] == "v1"
    assert asked["allow_patterns"] == [f"sub/{CONFIG}", f"sub/{WEIGHTS}"]
    assert hub.find_directory(tmp_path / "snapshot", subfolder="sub") == tmp_path / "snapshot" / "sub"


def test_an_adapter_of_another_input_width_is_refused(tmp_path):
    """b tells the outputs alone; A of another width would be another map."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), VeraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="0 had 4 inputs when the adapter was trained, but has 9 here"):
        VeraModel.from_pretrained(nn.Sequential(nn.Linear(9, 6)), tmp_path)
    other = get_peft_model(nn.Sequential(nn.Linear(9, 6)), VeraConfig(r=2, target_modules=["0"]))
    with pytest.raises(CheckpointError, match="had 4 inputs"):
        other.restore(tmp_path)


def test_the_digest_is_over_what_the_format_says(tmp_path):
    odd = nn.ModuleDict({'größe "1" \\ 客': nn.Linear(4, 3), "plain": nn.Linear(4, 3)})
    model = get_peft_model(odd, VeraConfig(r=2, target_modules="all-linear", fused_parts={"plain": 3}))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="np") as file:
        header = json.loads(file.metadata()["veratune"])
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    told = header.pop("sha256")
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in arrays.items():
        sha.update(json.dumps([name, f"torch.{array.dtype}", list(array.shape)]).encode() + array.tobytes())
    assert sha.hexdigest() == told and len(arrays) == 4


def test_the_file_says_what_model_it_is_for(tmp_path):
    class Named(nn.Sequential):
        config = SimpleNamespace(id2label={0: "no", 1: "yes"}, problem_type=None)

    get_peft_model(Named(nn.Linear(4, 2)), VeraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    shown = json.loads((tmp_path / CONFIG).read_text())["base"]
    assert shown == {"class": "Named", "id2label": {"0": "no", "1": "yes"}, "problem_type": None}
    header = native.read_native(tmp_path).header
    assert header["base"] == shown
