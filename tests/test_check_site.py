"""The check of the documentation site finds what is wrong in pages; a browser is not needed here."""

from pathlib import Path

import pytest

from scripts.check_site import main

PAGE = """<!doctype html><html><head><title>t</title></head><body>
<h1 id="top">Title</h1> <a href="#top">up</a> <a href="sub/other.html#there">other</a> <a href="https://host/x">x</a>
<img src="a%20b.svg" alt="picture"> <svg><path d="M0 0"></path></svg>
<table><tr><th>a</th><th>b</th></tr><tr><td colspan="2">c</td></tr></table>
{more}</body></html>"""
STDERR = '<div data-mime-type="application/vnd.jupyter.stderr"><pre>{lines}</pre></div><pre>{output}</pre>'


def site(folder: Path, more: str = "") -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "index.html").write_text(PAGE.format(more=more))
    (folder / "sub" / "other.html").write_text('<p id="there">text <a href="../">home</a></p>')
    (folder / "a b.svg").write_text("<svg/>")
    return folder


def test_a_sound_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = STDERR.format(lines="a warning\n", output="line\n" * 50)
    assert main([str(site(tmp_path / "site", output))]) == 0
    assert capsys.readouterr().out == "2 pages, 0 problems\n"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("<p>runs/<name></p>", "<name> is no element of HTML: escape the < in the source"),
        ('<a href="nothing.html">x</a>', "nothing.html does not exist"),
        ('<a href="#nowhere">x</a>', "#nowhere has no such anchor"),
        ('<a href="sub/other.html#nowhere">x</a>', "sub/other.html#nowhere has no such anchor"),
        ('<img src="missing.png">', "missing.png does not exist"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "rows of a table have 1 to 2 cells"),
        (STDERR.format(lines="progress\r" * 300, output=""), "cells print 300 lines to standard error"),
    ],
)
def test_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, problem: str) -> None:
    assert main([str(site(tmp_path / "site", more))]) == 1
    assert capsys.readouterr().out == f"index.html: {problem}\n2 pages, 1 problems\n"


def test_no_site(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
