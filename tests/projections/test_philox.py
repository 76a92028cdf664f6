import pytest
import torch

from reference import philox4x32_10, unit
from veratune.projections.philox import philox4x32, symmetric_uniform

CPU = torch.device("cpu")

# Random123's published known answers (kat_vectors, philox4x32 with 10 rounds): counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox4x32([torch.tensor(word) for word in counter], key)
    assert tuple(int(word) for word in words) == expected
    assert philox4x32_10(counter, key) == expected  # the tests' own reference as well


def test_philox_agrees_with_python_integers_on_random_counters():
    counters = torch.randint(0, 2**32, (4, 500))
    key = (0x12345678, 0xFEDCBA98)
    words = torch.stack(philox4x32(list(counters), key))
    expected = [philox4x32_10(tuple(column), key) for column in counters.t().tolist()]
    assert words.t().tolist() == [list(answer) for answer in expected]


def test_philox_leaves_its_counters_alone():
    counters = [torch.arange(5) for _ in range(4)]
    philox4x32(counters, (1, 2))
    assert all(torch.equal(counter, torch.arange(5)) for counter in counters)


@pytest.mark.parametrize(("rows", "width"), [(range(3), 10), (range(7, 9), 1), (range(1), 4), (range(0), 5)])
def test_uniform_agrees_with_the_definition(rows, width):
    key = (1 << 63) + 12345
    drawn = symmetric_uniform(key, (0, 1), rows, width, CPU)
    expected = [[unit(key, "A", k, j) for j in range(width)] for k in rows]
    assert drawn.dtype == torch.float32
    assert drawn.shape == (len(rows), width)
    assert drawn.tolist() == expected


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    whole = symmetric_uniform(3, (1, 1), range(40), 30, CPU)
    monkeypatch.setattr("veratune.projections.philox._CHUNK_BLOCKS", 20)
    assert torch.equal(symmetric_uniform(3, (1, 1), range(40), 30, CPU), whole)


def test_any_corner_is_the_corner_of_the_whole():
    whole = symmetric_uniform(5, (0, 1), range(50), 37, CPU)
    assert torch.equal(symmetric_uniform(5, (0, 1), range(11, 23), 20, CPU), whole[11:23, :20])


def test_streams_and_keys_give_other_numbers():
    draws = [
        symmetric_uniform(key, stream, range(20), 50, CPU)
        for key, stream in [(0, (0, 1)), (0, (1, 1)), (1, (0, 1)), (1 << 32, (0, 1)), (0, (0, 2))]
    ]
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert (first != second).double().mean() > 0.999


def test_distribution_is_uniform_and_symmetric():
    drawn = symmetric_uniform(0, (0, 1), range(400), 500, CPU).double().flatten()
    n = drawn.numel()
    assert drawn.abs().max() < 1
    assert not (drawn == 0).any()
    # Four standard errors of the mean, of the mean square, and of neighbours' products.
    assert drawn.mean().abs() < 4 * (1 / 3 / n) ** 0.5
    assert (drawn.square().mean() - 1 / 3).abs() < 4 * (4 / 45 / n) ** 0.5
    assert (drawn[1:] * drawn[:-1]).mean().abs() < 4 / 3 / n**0.5
    counts = torch.histc(drawn, bins=64, min=-1, max=1)
    chi_square = ((counts - n / 64).square() / (n / 64)).sum()
    assert chi_square < 63 + 4 * (2 * 63) ** 0.5


def test_meta_tensors_have_shapes_only():
    assert symmetric_uniform(0, (0, 1), range(3), 8, torch.device("meta")).is_meta
