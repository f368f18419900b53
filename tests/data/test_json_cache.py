"""Cached values can be computed again: anything but an intact entry counts as absent."""

from pathlib import Path

import pytest

from mythos.data.json_cache import load_cached, store_cached


def test_a_stored_value_is_loaded(tmp_path: Path) -> None:
    value = {"columns": ["text"], "bytes": [1, 2], "naïve": None}
    store_cached(tmp_path / "folder" / "x.json", value)
    assert load_cached(tmp_path / "folder" / "x.json") == value
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["x.json"]
    assert load_cached(tmp_path / "nothing.json") is None


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"columns": ["text"], "bytes": [17, 23]}
    store_cached(path, value)
    content = path.read_bytes()
    for place in range(len(content)):
        for byte in (0, content[place] ^ 1, 255):
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            assert load_cached(path) in (None, value), place
        path.write_bytes(content[:place])
        assert load_cached(path) is None


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b"[]", b"{}", b"null", b'{"value": 1}', b"\xff\xfe", b'"x"'], ids=repr
)
def test_other_json_is_absent(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert load_cached(tmp_path / "x.json") is None


def test_a_folder_that_cannot_be_written_is_named_with_what_chose_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x.json"
    store_cached(path, 1)
    store_cached(path, 1, "$MYTHOS_CACHE")
    assert [record.getMessage().partition(" cannot")[0] for record in caplog.records] == [
        f"data.cache_dir: {path}",
        f"$MYTHOS_CACHE: {path}",
    ]
