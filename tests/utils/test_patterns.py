import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veratune.utils.patterns import Budget, PatternError, pattern

NAMES = [
    "",
    "a",
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.mlp.down_proj",
    "model.vision.layers.3.q_proj",
    "h.0.attn.c_attn",
    "Model.Layers.1.Q_Proj",
    "x-y.z",
    "ab.ab.ab",
    "line\nbreak",
]
PATTERNS = [
    r".*",
    r"q_proj",
    r".*\.(q|k|v)_proj",
    r"^(?!.*vision).*\.q_proj$",
    r"(?i)model\..*q_proj",
    r"(?i:MODEL)\.layers\.[0-9]+\..*",
    r".*layers\.(0|1[0-9]|2)\..*",
    r"(?:\w+\.)*?q_proj",
    r"(\w+\.?)+",
    r"(a|b|\.)*",
    r"(ab\.?){2,3}",
    r"(ab\.?){3}",
    r"(a?b?){2,}\.?.*",
    r"(a?){1000}",
    r"\D+",
    r"[^.]+\.[^.]+",
    r"x\-y\.z",
    r"(?<=x)y|.*(?<=q_)proj",
    r".*(?<!q)_proj",
    r".*\bq_proj\b",
    r".*\Bproj",
    r"\Ah.*\Z",
    r"(?s).*",
    r"(?a)\w*",
    r"a|",
    r"(|a)+",
    r"(?x) q _ proj # a comment",
]


@pytest.mark.parametrize("text", PATTERNS)
def test_it_matches_what_re_matches(text: str) -> None:
    ours = pattern(text)
    for name in NAMES:
        assert ours.matches(name) == (re.fullmatch(text, name) is not None), name
        if not text.startswith(("(?i)", "(?s)", "(?a)", "(?x)", "^", r"\A")):
            expected = re.fullmatch(rf"(?:(?:.|\n)*\.)?(?:{text})", name) is not None
            assert ours.matches_end(name) == expected, name


PIECES = st.sampled_from(["a", "b", r"\.", ".", r"\w", "[ab]", "[^a]", r"\d", "^", "$", r"\b", "(?=a)", "(?!b)", ""])
EXPRESSIONS = st.recursive(
    PIECES,
    lambda inside: st.one_of(
        st.tuples(inside, inside).map("".join),
        st.tuples(inside, inside).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inside, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(EXPRESSIONS, st.text("ab.1", max_size=7))
def test_any_expression_matches_what_re_matches(text: str, name: str) -> None:
    assert pattern(text).matches(name) == (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    "text",
    [
        r"(\w+\.?)+!",
        r"((a|a)*)*b",
        r"(.*)*(.*)*x",
        r"(((\w+)*\.?)*)*!",
        r"(?:a?){5000}a{5000}b",
        r"(a{0,4000000000}){4000000000}b",
    ],
)
def test_what_backtracking_never_ends_with_ends(text: str) -> None:
    assert not pattern(text).matches("a" * 300)
    assert not pattern(text).matches("model.layers.0.self_attn.q_proj" * 4)


def test_names_joined_are_a_list() -> None:
    text = "|".join(re.escape(name) for name in NAMES if name)
    assert pattern(text).is_list and all(pattern(text).matches(name) for name in NAMES if name)
    assert not pattern(text).matches("model.layers.0.self_attn.q_pro")
    assert pattern("q_proj|o_proj").matches_end("model.layers.0.self_attn.q_proj")
    assert not pattern("proj").matches_end("model.layers.0.self_attn.q_proj")
    assert not pattern("a.b").is_list and not pattern("a*").is_list


@pytest.mark.parametrize(
    "text", ["(", "*", r"(a)\1", r"(?>a+)", "a++", r"(a)?(?(1)b|c)", "(" * 5000, "(?<=a*)b", "a{9999999999999}"]
)
def test_what_is_none_or_cannot_be_run_is_refused(text: str) -> None:
    with pytest.raises(PatternError):
        pattern(text)


def test_a_budget_is_for_all_names_together() -> None:
    budget = Budget(200)
    name = "model.layers.0.self_attn.q_proj"
    assert pattern(r".*\.(q|k)_proj").matches(name, budget)
    left = budget.left
    assert left < 200
    with pytest.raises(PatternError, match="too long"):
        any(not pattern(r".*\.(q|k)_proj").matches(name, budget) for _ in range(left + 1))
