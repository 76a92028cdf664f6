"""Rows in other encodings, with other separators, and in the layouts of chat data sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from veratune.cli.train.chat_rows import with_chats
from veratune.cli.train.data import check_columns, looks_measured
from veratune.cli.train.fields import SettingsError
from veratune.cli.train.preflight import unknown_tokens
from veratune.cli.train.reading import read_rows
from veratune.cli.train.settings import TrainSettings

CHINESE = "这部电影很好,我非常喜欢"


def write(path: Path, text: str, encoding: str) -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("encoding", "named"), [("gbk", "gb18030"), ("gb18030", "gb18030"), ("utf-16", "utf-16"), ("big5", "cp1252")]
)
def test_an_encoding_is_named_but_never_guessed(encoding: str, named: str, kind: str, tmp_path: Path) -> None:
    text = "這部電影很好" if encoding == "big5" else CHINESE
    rows = [{"text": text, "label": "好"}] * 3
    contents = {
        "csv": "text,label\n" + f'"{text}",好\n' * 3,
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
    }
    path = write(tmp_path / f"rows.{kind}", contents[kind], encoding)
    with pytest.raises(ValueError, match=rf"rows\.{kind} cannot be read: it is not UTF-8 .*--encoding.*{named}"):
        read_rows(path)
    assert read_rows(path, encoding="big5" if encoding == "big5" else named) == rows
    with pytest.raises(ValueError, match=r"it is not ascii .*: give another --encoding"):
        read_rows(path, encoding="ascii")
    for utf in ("utf-8", "utf-8-sig"):
        assert read_rows(write(tmp_path / f"rows.{kind}", contents[kind], utf)) == rows
        assert read_rows(path, encoding="UTF8") == rows


def test_an_accent_is_not_taken_for_chinese(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\nlástima por él,a\n" * 2, "cp1252")
    with pytest.raises(ValueError, match="such as gb18030, cp1252 or utf-16"):
        read_rows(path)
    assert read_rows(path, encoding="cp1252")[0]["text"] == "lástima por él"


def test_encodings_that_do_not_exist_or_do_not_apply(tmp_path: Path) -> None:
    for wrong in ("nonsense", "rot13", 7):
        with pytest.raises(SettingsError, match="the name of a text encoding"):
            TrainSettings("m", "d", "o", encoding=wrong)  # type: ignore[arg-type]
    (tmp_path / "rows.parquet").write_bytes(b"x")
    with pytest.raises(SettingsError, match="--encoding is for text files"):
        read_rows(str(tmp_path / "rows.parquet"), encoding="gbk")


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_separators_are_those_of_the_header(separator: str, tmp_path: Path) -> None:
    other = "," if separator != "," else ";"
    lines = [f'"a{other}b"', "label"], [f"one{other} two" if separator != "," else "one; two", "x"]
    path = write(tmp_path / "rows.csv", "".join(separator.join(line) + "\n" for line in lines), "utf-8")
    assert read_rows(path) == [{f"a{other}b": f"one{other} two", "label": "x"}]


def test_a_json_file_is_an_array_of_objects(tmp_path: Path) -> None:
    for text, message in (
        ('{"text": "a"}', "it is not a JSON array of objects"),
        ('[{"text": "a"}, 1]', "element 2 is not a JSON object"),
        ("[1", "it is not JSON"),
        ('[{"text": "a", "text": "b"}]', "'text' occurs twice"),
        ("[]", "has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(write(tmp_path / "rows.json", text, "utf-8"))


def chats(rows: list[dict[str, Any]], **settings: Any) -> list[Any]:
    made = TrainSettings("m", "rows", "o", task="causal-lm", **settings)
    found = with_chats("rows", rows, made)
    check_columns("rows", found, made)
    return [row[made.text_column] for row in found]


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


def test_sharegpt_and_alpaca() -> None:
    kind = {"role": "system", "content": "be kind"}
    assert chats([{"conversations": SHARED}]) == [TALK]
    assert chats([{"conversations": SHARED, "system": "be kind"}]) == [[kind, *TALK]]
    assert chats([{"conversations": [{"from": "system", "value": "be kind"}, *SHARED]}]) == [[kind, *TALK]]
    assert chats([{"mine": SHARED}], text_column="mine") == [TALK]
    assert chats([{"text": SHARED}, {"text": TALK}]) == [TALK, TALK]
    assert chats([{"messages": TALK}]) == [TALK]
    assert chats([{"text": "plain", "conversations": SHARED}]) == ["plain"]
    alpaca = {"instruction": "hi", "input": "", "output": "yes"}
    assert chats([alpaca]) == [TALK]
    longer = alpaca | {"input": "there", "history": [["a", "b"]], "system": "be kind"}
    before = [kind, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chats([longer]) == [[*before, {"role": "user", "content": "hi\n\nthere"}, TALK[1]]]


def test_chats_that_cannot_be_read() -> None:
    for rows, message in (
        ([{"conversations": [{"from": "me", "value": "hi"}]}], "row 1, message 1 is from 'me', whose role is unknown"),
        ([{"conversations": SHARED}, {"conversations": "hi"}, {}], "row 3 has nothing in the column 'text'"),
        ([{"conversations": SHARED[:1]}], "has no message of the role 'assistant'"),
        ([{"instruction": "", "output": "yes"}], "row 1: 'instruction' has nothing in it"),
        ([{"instruction": "a", "output": 3}], r"row 1: 'output' is a number \(3\)"),
        ([{"instruction": "a", "output": "b", "history": ["x"]}], "row 1: 'history' is not a list of pairs"),
        ([{"instruction": "a", "answer": "b"}], "has no column 'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            chats(rows)


def test_labels_that_look_like_measurements() -> None:
    settings = TrainSettings("m", "d", "o")
    for labels, expected in (
        ([1.0, 2.0], True),
        (["1.0", "2.0"], True),
        (["1.0", "2"], False),
        ([0, 1], False),
        (list(range(12)), True),
        ([str(i) for i in range(12)], True),
        ([*map(str, range(12)), "x"], False),
    ):
        assert looks_measured([{"label": label} for label in labels], settings) is expected, labels


def test_texts_of_unknown_tokens() -> None:
    from tiny_text import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    texts = [CHINESE, "a b c 好", "好 好 好"]
    warned = [unknown_tokens(tokenizer, [{"input_ids": tokenizer(text)["input_ids"]}]) for text in texts]
    assert warned[1] is None and warned[0] == warned[2] != None  # noqa: E711
    assert "turns 100 % of the texts' tokens into <unk>" in str(warned[0])
    tokenizer.unk_token = tokenizer.eos_token  # as in GPT-2, whose tokenizer knows every text
    assert unknown_tokens(tokenizer, [{"input_ids": [1, 1, 1]}]) is None
