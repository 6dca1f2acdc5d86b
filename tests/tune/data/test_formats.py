"""Every format, from every kind of file; and a bad row named with its file, its line and the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenfit.errors import BadFile, NotFound, UsageError
from qwenfit.tune.data import reading
from qwenfit.tune.data.formats import read_records

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好 😀"}
CHAT = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
CALLED = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {}}}

GUIDE = {"id": "x", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "你好 😀"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "你好 😀"}]}
ALPACA = {"instruction": "Hi", "input": "", "output": "你好 😀"}

GOOD = [
    (GUIDE, CHAT),
    ({"conversations": [{"from": "system", "value": "Be brief."}, *GUIDE["conversations"]]}, [SYSTEM, *CHAT]),
    ({"messages": CHAT}, CHAT),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWERED]}, CHAT),
    (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALLED]}],
    ),
    (SHAREGPT, CHAT),
    (SHAREGPT | {"system": "Be brief."}, [SYSTEM, *CHAT]),
    (
        {"conversations": [*SHAREGPT["conversations"], {"from": "tool", "value": "12:00"}]},
        [*CHAT, {"role": "tool", "content": "12:00"}],
    ),
    (ALPACA, CHAT),
    ({"instruction": "Add", "input": "1 2", "output": "3"},
     [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]),
    (ALPACA | {"system": "Be brief.", "history": [["Hi", "你好 😀"]]}, [SYSTEM, *CHAT, *CHAT]),
    ({"messages": [{"role": "user", "content": "<|im_end|>\ud83d\ude00\u0000"}]},
     [{"role": "user", "content": "<|im_end|>\ud83d\ude00\u0000"}]),
]  # fmt: skip


def read(path, form=None):
    return list(read_records(Path(path), form))


@pytest.mark.parametrize(("row", "messages"), GOOD)
def test_a_row_becomes_messages(row, messages, write):
    (record,) = read(write(json.dumps(row)))
    assert json.dumps(record.messages) == json.dumps(messages)
    assert record.source.endswith("data.jsonl:1")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
@pytest.mark.parametrize("row", [{"messages": CHAT}, SHAREGPT])
def test_tools_come_as_a_list_or_as_its_text(row, tools, write):
    assert read(write(json.dumps(row | {"tools": tools})))[0].tools == (TOOL,)


BAD = [
    ({"messages": []}, None, "at least one"),
    ({"messages": "Hi"}, None, "messages is not a list"),
    ({"messages": [{"role": "user"}]}, None, "no text content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, None, "the role 'wizard'"),
    ({"messages": ["Hi"]}, None, "Message 0 is not an object"),
    ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}]}, None, "without a function name"),
    ({"messages": [ASKED | {"weight": 0}, ANSWERED]}, None, "a weight of '0'"),
    ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, None, "a weight of '0.5'"),
    ({"messages": CHAT, "tools": "{"}, None, "tools are text that is not JSON"),
    ({"messages": CHAT, "tools": ["f"]}, None, "tools are not a list of objects"),
    ({"messages": CHAT, "tools": 1}, None, "tools are not a list of objects"),
    ({"conversations": []}, None, "conversation is empty"),
    ({"conversations": {}}, None, "conversations is not a list"),
    ({"conversations": ["Hi"]}, None, "Turn 0 is not an object"),
    ({"conversations": [{"value": "Hi"}]}, None, "Turn 0 is from 'None'"),
    ({"conversations": [{"from": "user"}]}, None, "Turn 0 has no value"),
    ({"conversations": [{"from": "user", "value": 3}]}, None, "Turn 0's value is not text"),
    ({"conversations": [{"from": "user", "value": "a"}, {"from": "bot", "value": "b"}]}, None, "Turn 1 is from 'bot'"),
    (SHAREGPT, "conversations", "Turn 0 is from 'human'; known are system, user, assistant"),
    (GUIDE, "sharegpt", "Turn 0 is from 'user'; known are system, human, gpt, tool"),
    ({"instruction": "Hi"}, None, "no output"),
    ({"instruction": ["Hi"], "output": "x"}, None, "row's instruction is not text"),
    ({"instruction": "Hi", "output": "x", "input": 1}, None, "row's input is not text"),
    ({"instruction": "Hi", "output": "x", "history": [["a"]]}, None, "History 0 is not a pair"),
    ({"instruction": "Hi", "output": "x", "history": "a"}, None, "history is not a list"),
    ({"instruction": "Hi", "output": "x", "system": 5}, None, "row's system is not text"),
    ({"text": ""}, None, "text is empty"),
    ({"text": None}, None, "row's text is not text"),
    ({"prompt": "Hi", "answer": "x"}, None, "keys 'prompt, answer' are those of no known format"),
    ({}, None, "no known format"),
    ({"text": "x"}, "messages", "messages is missing"),
]


@pytest.mark.parametrize(("row", "form", "reason"), BAD)
def test_a_bad_row_is_named_with_its_line_and_the_reason(row, form, reason, write):
    good = {"conversations": GUIDE, "sharegpt": SHAREGPT, "messages": {"messages": CHAT}}.get(form)
    path = write("\n".join(map(json.dumps, [good, row] if good else [row])))
    *before, bad = read(path, form)
    assert isinstance(bad, BadFile) and len(before) == bool(good)
    assert bad.message.startswith(f"{path}:{2 if good else 1}: ") and reason in bad.message


LINE = json.dumps(ALPACA).encode()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "not JSON or is cut short"),
        (LINE[:-1], "not JSON or is cut short"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a", "text": "b"}', "the key 'text' twice"),
        (b'{"text": NaN}', "NaN"),
        (b'{"text": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}", "too many digits"),
    ],
)
def test_a_line_that_is_no_json_object_is_named_and_the_next_is_read(raw, reason, write):
    path = write(LINE + b"\r\n\r\n" + raw + b"\r\n" + LINE)
    first, bad, last = read(path)
    assert first.messages == last.messages and last.source == f"{path}:4"
    assert isinstance(bad, BadFile) and f"{path}:3" in bad.message and reason in bad.message


def test_a_huge_line_is_named_and_the_next_is_read(write, monkeypatch):
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(reading, "CHUNK", 64)
    path = write(LINE + b"\n" + json.dumps({"text": "x" * 5000}).encode() + b"\n" + LINE)
    _, bad, last = read(path)
    assert isinstance(bad, BadFile) and f"{path}:2 has more than" in bad.message
    assert last.source == f"{path}:3"


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b" \r\n"])
def test_a_list_is_read_as_a_stream_with_the_line_of_each_element(chunk, indent, start, write, monkeypatch):
    rows = [GUIDE, GUIDE | {"id": 'a ] } , \\ " 你'}, GUIDE | {"n": -1.5e3}]
    raw = start + json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    monkeypatch.setattr(reading, "CHUNK", chunk)
    records = read(write(raw, "data.json"))
    assert [list(r.messages) for r in records] == [CHAT] * 3
    # Of the indented list, an element begins one line above its id.
    above = [raw.count(b"\n", 0, raw.index(mark)) for mark in (b'"x"', b'"a ]')]
    first = raw.count(b"\n", 0, raw.index(b"[")) + 1
    assert [int(r.source.rpartition(":")[2]) for r in records[:2]] == (above if indent else [first, first])


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'[\n{"text": "a"}\n', "data.json:3: a comma or the list's closing bracket is missing"),
        (b'[{"text": "a"} {"text": "b"}]', "data.json:1: a comma"),
        (b'[{"text": "a"},\n\n{"text": ]', "data.json:3 is not JSON or is cut short"),
        (b'[{"text": "a"},]', "data.json:1 is not JSON"),
        (b'[{"text": "a"}]\n]', "data.json:2: something follows the end"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', "data.json:2 is not UTF-8 text"),
        (b"[" * 200_000, "nested too deeply"),
        (b'[{"text": "' + b"x" * (9 << 20), "has more than 8 MiB in one row"),
    ],
)
def test_a_broken_list_is_named_with_its_line(raw, reason, write):
    with pytest.raises(BadFile, match=reason):
        read(write(raw, "data.json"))


def test_an_element_that_is_no_object_is_named_and_the_next_is_read(write):
    bad, text = read(write(b'[12,\n{"text": "x"}]', "data.json"))
    assert "data.json:1 is not a JSON object" in bad.message and text.text == "x"


@pytest.mark.parametrize("block", [1, 5, 16, 1 << 20])
def test_a_text_file_is_one_document_and_no_token_spans_a_cut(block, write, monkeypatch, small):
    text = "Ein Wort.\r\n\r\n  你好 Welt\n\n\n\tdef f(x):\n漢漢漢漢\n\u3000漢\nEnde\n\n"
    monkeypatch.setattr(reading, "BLOCK", block)
    path = write(text, "data.txt")
    records = read(path)
    assert "".join(r.text for r in records) == text
    assert [r.ends for r in records] == [False] * (len(records) - 1) + [True]
    assert [i for r in records for i in small.encode(r.text)] == small.encode(text)
    if block == 1:
        assert [(r.source, r.text[0]) for r in records] == [(f"{path}:1", "E"), (f"{path}:7", "漢"), (f"{path}:9", "E")]


def test_a_text_without_lines_is_cut_all_the_same(write, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 4)
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 10)
    assert [r.text for r in read(write("漢" * 25, "data.txt"))] == ["漢" * 10, "漢" * 10, "漢" * 5]


def test_a_text_file_that_is_no_text_is_named_with_its_line(write):
    for raw in (b"a\n\xff\n", b"a\n\xe6\xbc"):
        with pytest.raises(BadFile, match=r"data\.txt:2 is not UTF-8"):
            read(write(raw, "data.txt"))


def test_parquet_rows_are_read_and_nulls_are_absent_keys(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pa.Table.from_pylist([{"messages": CHAT}, {"messages": [SYSTEM, *CHAT], "tools": "[]"}]), path)
    first, second = read(path)
    assert list(first.messages) == CHAT and second.messages[0] == SYSTEM and second.source == f"{path}:2"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadFile, match="cannot be read"):
        read(path)


def test_parquet_without_its_reader_names_the_extra(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(NotFound, match="pyarrow") as caught:
        read(write(b"PAR1", "data.parquet"))
    assert "qwenfit[tune]" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "form", "error", "reason"),
    [
        ("data.csv", None, UsageError, "none of the data files known"),
        ("data.jsonl", "chatgpt", UsageError, "format must be one of"),
        ("data.txt", "alpaca", UsageError, "is text, and the format named is alpaca"),
    ],
)
def test_an_unknown_kind_of_file_or_format_is_refused(name, form, error, reason, write):
    with pytest.raises(error, match=reason):
        read(write("x", name), form)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(NotFound):
        read(tmp_path / "data.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(BadFile, match="directory"):
        read(tmp_path / "folder.json")
