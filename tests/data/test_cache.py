"""What is kept can be made again: anything else than what was written counts as nothing."""

from pathlib import Path

import pytest

from mythos.data.cache import keep, kept


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    value = {"columns": ["text"], "bytes": [1, 2], "naïve": None}
    keep(tmp_path / "folder" / "x.json", value)
    assert kept(tmp_path / "folder" / "x.json") == value
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["x.json"]
    assert kept(tmp_path / "nothing.json") is None


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"columns": ["text"], "bytes": [17, 23]}
    keep(path, value)
    content = path.read_bytes()
    for place in range(len(content)):
        for byte in (0, content[place] ^ 1, 255):
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            assert kept(path) in (None, value), place
        path.write_bytes(content[:place])
        assert kept(path) is None


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b"[]", b"{}", b"null", b'{"value": 1}', b"\xff\xfe", b'"x"'], ids=repr
)
def test_other_json_is_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert kept(tmp_path / "x.json") is None
