import copy
import gc
import hashlib
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reference import unit
from small_net import FIRST_LAYER
from veratune import VeraConfig, get_peft_model
from veratune.projections.pool import ProjectionPool, ProjectionView, projection_pool
from veratune.projections.schemes import PeftShared, PerDimension, Stored

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture
def pool() -> ProjectionPool:
    return ProjectionPool()


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# Values


def test_a_is_scaled_by_its_own_width_and_b_by_the_rank():
    scheme = PerDimension(7)
    a = scheme.draw("A", range(3), 6, CPU)
    b = scheme.draw("B", range(3), 5, CPU)
    expected_a = [[unit(7, "A", k, j) * math.sqrt(6 / 6) for j in range(6)] for k in range(3)]
    torch.testing.assert_close(a.double(), torch.tensor(expected_a, dtype=torch.float64), rtol=1e-7, atol=0)
    assert b.tolist() == [[unit(7, "B", k, j) for j in range(5)] for k in range(3)]
    assert scheme.scale(24) == math.sqrt(6 / 24)


@pytest.mark.parametrize("width", [64, 384, 4096])
def test_bounds_are_kaiming_uniform(width):
    a = PerDimension(0).draw("A", range(64), width, CPU)
    bound = math.sqrt(6 / width)
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.99 * bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


# The scheme's values belong to every adapter that was ever trained: a change here breaks them all. A new scheme
# version is the way to change them, never this table.
GOLDEN_PER_DIMENSION = {
    (0, "A", 256, 384): "1581bb5c7324b6edcdeec873bf2e19e16bba793aac4cd35d48ee676f1e09c373",
    (0, "B", 256, 384): "1a66437037e54e6bd4b269cb931b1b23880261a01ee6a29ab1292233f82762dc",
    (0, "A", 64, 1001): "5e71e7d2d9d2cc8efe8aaed6024415e7c8793680fde9bfea063dfa7cd3b5df94",
    (2**64 - 1, "B", 8, 4096): "67a8847eb77804aab450571abee53474e36446d9bd7723a4efb55af6b07f544a",
    (123456789, "A", 1024, 30): "c5de40378f64b17ec17fc53cfe3a8942298cc671edcb43367a0a1dad9eb8048e",
}
GOLDEN_FINGERPRINTS = {0: "b6e94dd8ce51b8b6", 2**64 - 1: "e02d6e2e6d4ced18"}


@pytest.mark.parametrize(("case", "expected"), GOLDEN_PER_DIMENSION.items(), ids=str)
def test_golden_values(case, expected):
    key, side, rank, width = case
    assert sha(PerDimension(key).draw(side, range(rank), width, CPU)) == expected


@pytest.mark.parametrize(("key", "expected"), GOLDEN_FINGERPRINTS.items())
def test_golden_fingerprints(key, expected):
    assert PerDimension(key).fingerprint() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("case", "expected"), GOLDEN_PER_DIMENSION.items(), ids=str)
def test_golden_values_on_a_gpu(case, expected):
    key, side, rank, width = case
    assert sha(PerDimension(key).draw(side, range(rank), width, torch.device("cuda")).cpu()) == expected


def test_golden_values_of_the_peft_scheme():
    """These belong to torch's CPU generator: a torch that draws others would break PEFT's adapters, and say so here."""
    scheme = PeftShared(key=7, r=16, max_in=40, max_out=50)
    assert (
        sha(scheme.draw("A", range(16), 40, CPU)) == "d363b315d4ee4d4f106ce165a60b893dbf55e673b5267cb4c5968f344c030c16"
    )
    assert (
        sha(scheme.draw("B", range(16), 50, CPU)) == "95a24609efb5fcd4885c9f92afd30a8f3b126cbece7c1c04b3cc645d8d6d65ae"
    )


def test_ranks_are_prefixes():
    scheme = PerDimension(1)
    for side in ("A", "B"):
        assert torch.equal(scheme.draw(side, range(64), 50, CPU), scheme.draw(side, range(256), 50, CPU)[:64])


def test_peft_scheme_draws_as_its_definition_says():
    scheme = PeftShared(key=3, r=4, max_in=7, max_out=9)
    generator = torch.Generator().manual_seed(3)
    a_bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(7))
    b_bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(4))
    a = torch.empty(4, 7).uniform_(-a_bound, a_bound, generator=generator)
    b = torch.empty(9, 4).uniform_(-b_bound, b_bound, generator=generator)
    assert torch.equal(scheme.draw("A", range(4), 7, CPU), a)
    assert torch.equal(scheme.draw("B", range(4), 9, CPU), b.t())


def test_fingerprints_tell_sources_apart():
    a, b = torch.randn(4, 6), torch.randn(5, 4)
    schemes = [
        PerDimension(0),
        PerDimension(1),
        PeftShared(0, 4, 6, 5),
        PeftShared(1, 4, 6, 5),
        PeftShared(0, 4, 7, 5),
        Stored.from_tensors(a, b),
        Stored.from_tensors(a + 1e-3, b),
    ]
    assert len({scheme.fingerprint() for scheme in schemes}) == len(schemes)
    assert Stored.from_tensors(a, b) == Stored.from_tensors(a.clone(), b.clone())


# The pool


def test_nothing_is_drawn_before_it_is_used(pool):
    view = pool.view(PerDimension(0), "A", 8, 16)
    assert pool.summary() == []
    view.values(CPU, F32)
    assert [(info.side, info.rank, info.width, info.nbytes) for info in pool.summary()] == [("A", 8, 16, 8 * 16 * 4)]


def test_layers_of_one_width_share_memory(pool):
    first, second = (pool.view(PerDimension(0), "A", 8, 16) for _ in range(2))
    assert first.values(CPU, F32).data_ptr() == second.values(CPU, F32).data_ptr()
    other_key = pool.view(PerDimension(1), "A", 8, 16)
    assert other_key.values(CPU, F32).data_ptr() != first.values(CPU, F32).data_ptr()


def test_freed_with_the_last_layer(pool):
    first, second = (pool.view(PerDimension(0), "A", 8, 16) for _ in range(2))
    first.values(CPU, F32)
    second.values(CPU, F32)
    del first
    gc.collect()
    assert len(pool.summary()) == 1
    del second
    gc.collect()
    assert pool.summary() == []


@pytest.mark.parametrize("small_first", [True, False])
def test_growth_keeps_values_and_one_tensor(pool, small_first):
    small, large = (pool.view(PerDimension(0), "B", rank, 12) for rank in (4, 32))
    order = [small, large] if small_first else [large, small]
    before = [view.values(CPU, F32).clone() for view in order]
    after = [view.values(CPU, F32) for view in order]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(small.values(CPU, F32), large.values(CPU, F32)[:4])
    assert small.values(CPU, F32).data_ptr() == large.values(CPU, F32).data_ptr()
    assert [info.rank for info in pool.summary()] == [32]


def test_trim_frees_rows_of_ranks_that_are_gone(pool):
    small, large = (pool.view(PerDimension(0), "B", rank, 12) for rank in (4, 32))
    kept = small.values(CPU, F32).clone()
    large.values(CPU, F32)
    small.values(CPU, F32)
    del large
    gc.collect()
    pool.trim()
    assert [info.rank for info in pool.summary()] == [4]
    assert torch.equal(small.values(CPU, F32), kept)


def test_dtypes_are_rounded_from_the_same_float32_values(pool):
    view = pool.view(PerDimension(0), "A", 8, 16)
    reference = PerDimension(0).draw("A", range(8), 16, CPU)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(view.values(CPU, dtype), reference.to(dtype))


def test_peft_corners_are_views_of_one_tensor(pool):
    scheme = PeftShared(key=0, r=4, max_in=20, max_out=30)
    narrow, wide = pool.view(scheme, "A", 4, 8), pool.view(scheme, "A", 4, 20)
    assert torch.equal(narrow.values(CPU, F32), wide.values(CPU, F32)[:, :8])
    assert narrow.values(CPU, F32).data_ptr() == wide.values(CPU, F32).data_ptr()


def test_other_devices_are_let_go(pool):
    view = pool.view(PerDimension(0), "A", 8, 16)
    view.values(CPU, F32)
    view.values(torch.device("meta"), F32)
    view.keep_only(torch.device("meta"))
    assert [info.device.type for info in pool.summary()] == ["meta"]


def test_deepcopy_shares_and_pickle_draws_again():
    view = projection_pool.view(PerDimension(0), "A", 8, 16)
    values = view.values(CPU, F32)
    assert copy.deepcopy(view).values(CPU, F32).data_ptr() == values.data_ptr()
    data = pickle.dumps(view)
    assert len(data) < 1000
    restored = pickle.loads(data)
    assert torch.equal(restored.values(CPU, F32), values)


def test_a_projection_made_in_inference_mode_serves_training(pool):
    view = pool.view(PerDimension(0), "A", 8, 16)
    with torch.inference_mode():
        assert not view.values(CPU, F32).is_inference()
    x = torch.randn(2, 16, requires_grad=True)
    (x @ view.values(CPU, F32).t()).sum().backward()
    assert x.grad is not None


def test_a_tracing_mode_leaves_nothing_behind(pool):
    view = pool.view(PerDimension(0), "A", 8, 16)
    with FakeTensorMode():
        assert view.values(CPU, F32).shape == (8, 16)
    assert type(view.values(CPU, F32)) is torch.Tensor
    assert torch.equal(view.values(CPU, F32), PerDimension(0).draw("A", range(8), 16, CPU))


def test_defaults_of_the_caller_do_not_matter(pool):
    expected = PerDimension(0).draw("A", range(8), 16, CPU)
    view = pool.view(PerDimension(0), "A", 8, 16)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = view.values(CPU, F32)
            peft = PeftShared(0, 2, 3, 4).draw("A", range(2), 3, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)
    assert torch.equal(peft, PeftShared(0, 2, 3, 4).draw("A", range(2), 3, CPU))


def test_many_threads_get_one_tensor_each_value_right(pool):
    views: list[ProjectionView] = [pool.view(PerDimension(0), "A", rank, 64) for rank in range(1, 33)]
    expected = PerDimension(0).draw("A", range(32), 64, CPU)
    wrong: list[int] = []
    barrier = threading.Barrier(8)

    def work(offset: int) -> None:
        barrier.wait()
        turned = views[offset:] + views[:offset]
        wrong.extend(c.rank for c in turned if not torch.equal(c.values(CPU, F32), expected[: c.rank]))

    threads = [threading.Thread(target=work, args=(4 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(pool.summary()) == 1


@pytest.mark.parametrize("shrink", [False, True])
def test_growing_or_trimming_in_inference_mode_harms_no_training(shrink):
    model = get_peft_model(nn.Sequential(nn.Linear(53, 53)), VeraConfig(**FIRST_LAYER), adapter_name="small")
    x = torch.randn(2, 53)
    model(x).sum().backward()
    model.add_adapter("large", VeraConfig(**{**FIRST_LAYER, "r": 16}))
    model.set_adapter(["small", "large"])
    with torch.inference_mode():
        model(x)
        if shrink:
            model.delete_adapter("large")
    model.set_adapter("small")
    model(x).sum().backward()


def test_a_change_of_dtype_lets_the_old_projections_go():
    from veratune import projection_pool

    model = get_peft_model(nn.Sequential(nn.Linear(71, 71)), VeraConfig(**FIRST_LAYER))
    model(torch.randn(1, 71))
    model.to(torch.bfloat16)
    model(torch.randn(1, 71).bfloat16())
    assert {info.dtype for info in projection_pool.summary() if info.width == 71} == {torch.bfloat16}


def test_deleting_and_merging_free_projections_by_themselves():
    from veratune import projection_pool

    model = get_peft_model(nn.Sequential(nn.Linear(73, 73)), VeraConfig(**FIRST_LAYER))
    model.add_adapter("large", VeraConfig(**{**FIRST_LAYER, "r": 64}))
    model.set_adapter(["default", "large"])
    model(torch.randn(1, 73))
    model.delete_adapter("large")
    assert {info.rank for info in projection_pool.summary() if info.width == 73} == {4}
    model.merge_adapter()
    assert not any(info.width == 73 for info in projection_pool.summary())
