import os

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import (
    atomic_path,
    disk_is_full,
    inside,
    parse_yaml,
    read_json,
    sha256,
    write_json,
    write_text,
)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="midway"), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("midway")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    with atomic_path(tmp_path / "private") as temporary:
        temporary.touch(mode=0o600)
    (tmp_path / "usual").touch()
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "model"
    for name in ("one", "two"):
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path):
    full = open("/dev/full", "w")  # noqa: SIM115
    full.write("x")
    with pytest.raises(PhoenixError, match="disk is full"), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        full.flush()
    assert list(tmp_path.iterdir()) == []


def test_a_library_s_word_for_a_full_disk_is_understood():
    assert disk_is_full(RuntimeError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"))
    assert not disk_is_full(RuntimeError("out of memory"))


LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PhoenixError, match=r"bad\.json: not a JSON file"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(PhoenixError, match="No such file"):
        read_json(tmp_path / "none.json")


def test_a_directory_s_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = sha256(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert sha256(tmp_path / "a") != first
    (tmp_path / "a" / "y").rename(tmp_path / "a" / "x")
    assert sha256(tmp_path / "a") == first


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_stay_inside(tmp_path, name):
    with pytest.raises(PhoenixError, match="leads out"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/b") == tmp_path / "a" / "b"


@pytest.mark.parametrize("text", ["4:2", "2:4", "-1:30", "1:30:00", "190:20:30.15", "+1:0.5"])
def test_yaml_has_no_numbers_of_base_60(text):
    assert not isinstance(yaml.safe_load(text), str)  # so it has been, and this test sees the difference
    assert parse_yaml(text) == text
    assert parse_yaml(f"{{a: [{text}]}}") == {"a": [text]}
    assert parse_yaml(yaml.safe_dump(text)) == text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.dates() | st.text("ab:4.2 -"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:4", max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(VALUES)
def test_all_else_of_yaml_stays_what_it_is(value):
    assert parse_yaml(yaml.safe_dump(value)) == value
    for text in ("0x1F", "0b1", "017", "1_000", "1.5e+3", ".inf", "yes", "~", "2025-01-02", "!!int '4:2'"):
        assert parse_yaml(text) == yaml.safe_load(text)


def test_a_file_never_takes_a_directory_s_place(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work").write_text("years of it")
    with pytest.raises(PhoenixError, match="mine: a directory, and what is written is a file; give a file's name"):
        write_json(tmp_path / "mine", {})
    assert (tmp_path / "mine" / "work").read_text() == "years of it"


def test_a_place_below_a_file_is_told_and_not_traced(tmp_path):
    (tmp_path / "file").write_text("a file")
    with (
        pytest.raises(PhoenixError, match="it can't be written; give another place"),
        atomic_path(tmp_path / "file" / "x") as temporary,
    ):
        temporary.mkdir()
