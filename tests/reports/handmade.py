"""Write run directories with chosen records, and parse pages."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mythos.config.loading import save_config
from mythos.config.sections import Config
from tests.runs import tiny

VOID = {"meta", "br"}


def records(steps: int, first: int = 1) -> list[dict[str, Any]]:
    """Records of every step, in which all numbers differ."""
    return [
        {
            "step": step,
            "tokens": 256 * step,
            "loss": 6 - 0.37 * step + 0.011 * step**2,
            "grad_norm": 1.5 / step,
            "state_norm": 2 + 0.1 * step,
            "state_delta": 0.5 / step,
            "lr": 1e-3 * (1 + step % 3),
            "loops": 2 + step % 4 / 4,
            "backprop_loops": 1.5 + step % 2 / 8,
            "skipped_steps": 0,
            "rollbacks": 0,
            "rho_a": 0.447 + step / 1000,
            "peak_memory_bytes": 2**28 + step * 2**20,
            "tokens_per_second": 1000.0 + 7 * step,
            "time": 1_760_000_000.0 + 60 * step,
        }
        for step in range(first, first + steps)
    ]


def write_run(directory: Path, written: Sequence[dict[str, Any]], config: Config | None = None, **changes: Any) -> Path:
    """Write a run directory with these records; the default configuration is `tests.runs.tiny` with changes."""
    directory.mkdir(parents=True)
    config = config or tiny(directory, **{"model__vocab_size": 384, "train__steps": 100, **changes})
    save_config(config, directory / "config.yaml")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in written))
    return directory


class Page(HTMLParser):
    """Parses a page: checks that all elements are closed; collects references, ids, tables and headline."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.raw = text
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.events: set[str] = set()
        self.cells: list[list[list[str]]] = []
        self.terms: list[str] = []
        self.values: list[str] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.references += re.findall(r"url\(([^)]*)\)", text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
                self.references.append(value or "")
            if name.startswith("on"):
                self.events.add(name)
        if tag not in VOID:
            self.open.append(tag)
        for kind, place, new in (("table", self.cells, []), ("h2", self.headings, ""), ("pre", self.texts, "")):
            if tag == kind:
                place.append(new)
        for kind, place in (("dt", self.terms), ("dd", self.values)):
            if tag == kind:
                place.append("")
        if tag == "tr":
            self.cells[-1].append([])
        if tag in ("td", "th"):
            self.cells[-1][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        place = {"dt": self.terms, "dd": self.values, "h2": self.headings, "pre": self.texts}.get(inside)
        if inside in ("td", "th"):
            place = self.cells[-1][-1]
        if place is not None:
            place[-1] += data

    @property
    def headline(self) -> dict[str, str]:
        return dict(zip(self.terms, self.values, strict=True))

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the only table whose header begins with `header`."""
        [match] = [table for table in self.cells if table[0][: len(header)] == list(header)]
        return match[1:]

    def assert_self_contained(self) -> None:
        """Assert that the page loads and runs nothing, and that every internal reference has one target."""
        assert not self.tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "audio", "video"}
        assert not self.events
        assert bool(self.references) == ("svg" in self.tags), "pictures refer to their own parts"
        assert all(reference.startswith("#") for reference in self.references)
        assert len(set(self.ids)) == len(self.ids)
        assert {reference[1:] for reference in self.references} <= set(self.ids)
        assert "@import" not in self.raw and "javascript:" not in self.raw
