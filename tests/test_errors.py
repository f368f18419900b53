"""Credentials in messages."""

import logging

import pytest

from mythos.errors import log_messages, without_credentials


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:secret@bucket/dir", "s3://***@bucket/dir"),
        ("https://token@host/a?b=c&d=e", "https://***@host/a?***"),
        ("data.path=[https://u:p@a/x.txt, https://b/y.txt]", "data.path=[https://***@a/x.txt, https://b/y.txt]"),
        ("https://host/part-?.parquet", "https://host/part-?.parquet"),
        ("/data/user@site/x?y=1", "/data/user@site/x?y=1"),
    ],
)
def test_without_credentials(text, expected):
    assert without_credentials({"a": [text], "b": 1, "c": None}) == {"a": [expected], "b": 1, "c": None}


def test_log_messages_hide_credentials(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    log_messages()
    logging.getLogger("somebody.else").warning("asked %s", "https://user:secret@host/x?token=secret")
    assert capsys.readouterr().err == "WARNING: asked https://***@host/x?***\n"
