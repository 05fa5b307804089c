import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.jsonl import read_jsonl

ROWS = st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.booleans()), min_size=1, max_size=5)


@given(rows=ROWS, end=st.sampled_from(["", "\n"]), ascii_only=st.booleans())
def test_reads_what_was_written(tmp_path_factory, rows, end, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + end
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"a": 1}\n\n{"a": 2}\n', r":2: not a JSON object"),
        (b'{"a": 1}\n{"a": 2', r":2: not a JSON object"),
        (b"[1]\n", r":1: a JSON object was expected, not list"),
        (b'{"a": NaN}\n', r":1: .*NaN is not a JSON number"),
        (b'{"a": 1, "a": 2}\n', r":1: .*'a' stands twice"),
        (b'{"a": "\xff"}\n', r":1: not UTF-8"),
        (b"[" * 100_000, r":1: not a JSON object"),
    ],
)
def test_names_the_line_of_a_mistake(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(PhoenixError, match=message) as caught:
        read_jsonl(path)
    assert "train.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(PhoenixError, match="no such file"):
        read_jsonl(tmp_path / "train.jsonl")


def test_line_separators_inside_a_string_do_not_end_a_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": "x\u2028y\x85z"}\n', encoding="utf-8")
    assert read_jsonl(path) == [{"a": "x\u2028y\x85z"}]
