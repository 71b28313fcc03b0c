"""Whole files: atomic writes, plain tensors, JSON without NaN."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from refusal_mi.errors import UserError
from refusal_mi.files import (
    FORMAT,
    read_json,
    read_record,
    read_tensors,
    sha256_file,
    sha256_json,
    write_json,
    write_record,
    write_tensors,
    write_whole,
)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"old": True})

    def half_then_fail(temporary):
        temporary.write_text('{"new": tr')
        raise error

    with pytest.raises(error):
        write_whole(path, half_then_fail)
    assert read_json(path) == {"old": True}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_write_that_succeeds_replaces_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    write_json(tmp_path / "a.json", [2, "é"])
    assert read_json(tmp_path / "a.json") == [2, "é"]
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_a_file_appears_whole_by_a_rename(tmp_path):
    """It is the temporary file under another name, and who has the old one open goes on reading the old one."""
    path, written = tmp_path / "a.json", []

    def write(temporary):
        temporary.write_text("[2]")
        written.append((temporary.parent, temporary.stat().st_ino))

    path.write_text("[1]")
    before = path.stat().st_ino
    with path.open() as reader:
        write_whole(path, write)
        assert reader.read() == "[1]"
    assert written == [(tmp_path, path.stat().st_ino)] and path.stat().st_ino != before
    assert path.read_text() == "[2]" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_never_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": value})
    assert list(tmp_path.iterdir()) == []


def test_bare_nan_of_published_files_is_read(tmp_path):
    (tmp_path / "a.json").write_text('[{"x": NaN}]')
    assert math.isnan(read_json(tmp_path / "a.json")[0]["x"])


@pytest.mark.parametrize("text", [None, "{", b"\xff\xfe\xfa"])
def test_unreadable_json_is_a_user_error(tmp_path, text):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="no such file" if text is None else "not valid JSON"):
        read_json(path)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_folder_in_the_place_of_a_file_is_a_user_error(tmp_path, read):
    with pytest.raises(UserError, match=r"cannot read .*directory"):
        read(tmp_path)


def test_a_view_is_saved_with_its_own_storage(tmp_path):
    whole = torch.randn(500, 64, dtype=torch.float64, requires_grad=True)
    write_tensors(tmp_path / "row.pt", whole[3])
    torch.save(whole[3].detach(), tmp_path / "view.pt")
    assert (tmp_path / "view.pt").stat().st_size > 500 * 64 * 8
    assert (tmp_path / "row.pt").stat().st_size < 4096
    loaded = torch.load(tmp_path / "row.pt", weights_only=True)
    assert torch.equal(loaded, whole[3].detach()) and not loaded.requires_grad
    assert loaded.untyped_storage().nbytes() == 64 * 8


def test_equal_tensors_are_equal_bytes_under_any_name(tmp_path):
    value = {"a": torch.ones(2), "b": [torch.zeros(3, 1).T]}
    paths = [tmp_path / "one.pt", tmp_path / "elsewhere" / "another name.pt"]
    for path in paths:
        write_tensors(path, value)
        torch.save(value, path.with_suffix(".plain"))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].with_suffix(".plain").read_bytes() != paths[1].with_suffix(".plain").read_bytes()


@dataclass(frozen=True)
class Pair:
    name: str
    values: tuple[float, ...] = ()


def test_a_record_comes_back_and_what_cannot_be_read_is_one_clear_line(tmp_path):
    path, record = tmp_path / "pair.json", Pair("a", (1.0, 2.5))
    write_record(path, record)
    saved = read_json(path)
    assert saved["format"] == FORMAT and read_record(path, Pair) == record
    write_json(path, {key: value for key, value in saved.items() if key != "format"} | {"unknown": 1})
    assert read_record(path, Pair) == record  # written before there was a number; a key that nothing reads
    for damaged, line in (
        (saved | {"format": FORMAT + 1}, rf"pair\.json is of format {FORMAT + 1}, .* reads format {FORMAT}"),
        ({"values": []}, "damaged.*: name: Field required"),
        (saved | {"values": ["x"]}, r"damaged.*: values\.0: "),
        ([saved], "damaged.*: the whole: "),
    ):
        write_json(path, damaged)
        with pytest.raises(UserError, match=line) as raised:
            read_record(path, Pair)
        assert "\n" not in str(raised.value)


def test_dicts_and_lists_of_tensors_come_back(tmp_path):
    value = {"a": torch.ones(2), "b": [torch.zeros(3, 1).T]}
    write_tensors(tmp_path / "v.pt", value)
    loaded = read_tensors(tmp_path / "v.pt")
    assert torch.equal(loaded["a"], value["a"]) and torch.equal(loaded["b"][0], value["b"][0])
    assert loaded["b"][0].is_contiguous()


class _Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def test_only_plain_tensors_are_read(tmp_path, capsys):
    torch.save({"x": _Surprise()}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("code", "text", "empty"):
        with pytest.raises(UserError, match="plain tensors"):
            read_tensors(tmp_path / f"{name}.pt")
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.pt")


def test_hashes_follow_the_content_only(tmp_path):
    (tmp_path / "a").write_text("x")
    assert sha256_file(tmp_path / "a") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json(json.loads('{"b":[2],"a":1}'))
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})
