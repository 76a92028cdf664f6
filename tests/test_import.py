import subprocess
import sys


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_veratune_imports_nothing_heavy():
    assert "torch" not in imported_by("import veratune")  # which the command line does for its help
    modules = imported_by("import veratune; veratune.VeraModel, veratune.AdapterBank, veratune.parameter_groups")
    assert "veratune.model" in modules
    assert "veratune.bank" in imported_by("import veratune; veratune.bank.AdapterBank")
    assert not modules & {"transformers", "peft", "accelerate", "pandas", "matplotlib", "torch._dynamo"}


def test_adapting_a_plain_model_imports_nothing_heavy():
    modules = imported_by(
        "import torch, veratune; veratune.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 3)),"
        " veratune.VeraConfig(r=2, target_modules='all-linear'))(torch.ones(1, 2)).sum().backward()"
    )
    assert not modules & {"transformers", "peft", "accelerate", "bitsandbytes", "torchao", "torch._dynamo"}


def test_all_public_names_exist():
    import veratune

    for name in veratune.__all__:
        assert hasattr(veratune, name)
