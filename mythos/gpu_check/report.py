"""The report: a line for each check. It is rewritten after each check, so a crash loses nothing."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mythos.files.local import write_whole
from mythos.gpu_check.result import Verdict


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    stage: str
    name: str
    expected: str
    measured: str
    verdict: Verdict
    device: str = ""
    """cpu or cuda; empty if no process reached the check."""
    detail: str = ""
    """A traceback, or the last lines that the process printed."""


class Report:
    """Writes results to `report.md` and `report.json` in a folder, and passes a line for the console to `show`.

    Raises OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, show: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.show = show
        self.lines: list[Line] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, line: Line) -> None:
        """Append a line, show it, and write both files."""
        self.lines.append(line)
        self.show(f"{line.verdict:8} {line.stage:12} {line.name}: {first_line(line.measured)}")
        self.write()

    @property
    def unexpected(self) -> bool:
        """Whether a check is failed or off."""
        return any(line.verdict in ("failed", "off") for line in self.lines)

    def summary(self) -> str:
        """The number of lines by verdict."""
        counts = Counter(line.verdict for line in self.lines)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("ok", "off", "failed", "not run"))

    def write(self) -> None:
        """Replace both files, each at once."""
        lines = [asdict(line) for line in self.lines]
        content = json.dumps({"summary": self.summary(), "lines": lines}, indent=1)
        write_whole(self.folder / "report.json", content + "\n")
        write_whole(self.folder / "report.md", self.page())

    def page(self) -> str:
        """The report as Markdown: a table, then the details of checks that went wrong."""
        rows = [
            f"| {line.stage} | {cell(line.name)} | {cell(line.expected)} | {cell(first_line(line.measured))}"
            f"{f' ({line.device})' if line.device else ''} | {line.verdict} |"
            for line in self.lines
        ]
        details = [
            f"## {line.stage}: {line.name}\n\n{line.verdict}: {line.measured}\n\n````\n{line.detail.strip()}\n````\n"
            for line in self.lines
            if line.detail
        ]
        head = ["# mythos gpu-check", "", self.summary(), ""]
        table = ["| stage | check | expected | measured | verdict |", "|---|---|---|---|---|", *rows, ""]
        return "\n".join([*head, *table, *details])


def first_line(text: str) -> str:
    """The first line, cut to 300 characters, because a compiler's message can fill pages."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 300 else line[:297] + "..."


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|")
