"""Check the built documentation site, as files and in a headless browser.

python scripts/check_site.py [build/site] [--screenshots DIR]

Every page is parsed: links, anchors and pictures must exist, tags must be those of HTML, rows of a table must have its
number of cells, and a notebook must not print progress to standard error. With --screenshots every page is also opened
in Chromium, as wide as a desktop (1280) and as a phone (390): nothing may be wider than the window, pictures must load,
and scripts must not report errors. Screenshots of the pages in SHOWN are written to DIR. This needs the extra docs and
Chromium: Debian's package chromium, or `playwright install chromium`. Prints the problems; the exit status is 1 if
there are any.
"""

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
SHOWN = ("index", "quickstart", "configuration", "notebooks/train-and-look", "notebooks/depth")
"""Pages whose screenshots are written."""
TALLEST = 6000
"""Pixels of a page that a screenshot shows; the rest of a long reference looks the same."""
STDERR_LINES = 10
"""Lines of standard error on a page: more than a warning or two hides what the page is about."""
TAGS = """
    a abbr address article aside audio b base blockquote body br button canvas caption cite code col colgroup dd del
    details dialog dfn div dl dt em figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html i iframe img
    input ins kbd label legend li link main mark meta nav noscript ol optgroup option p picture pre q s samp script
    section select small source span strong style sub summary sup table tbody td template textarea tfoot th thead
    time title tr u ul var video wbr clipboard-copy
""".split()  # noqa: SIM905 (a literal of 90 strings is harder to read)
"""Elements of HTML, and one that the pages of notebooks define. Anything else is text whose `<` was not escaped."""
CUT_OFF = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width) return [];
    const scrolls = element => {
        for (let e = element.parentElement; e && e !== document.body; e = e.parentElement)
            if (getComputedStyle(e).overflowX !== "visible") return true;
        return false;
    };
    return [...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
        .slice(0, 3)
        .map(e => `<${e.tagName.toLowerCase()} class="${e.className}"> ${(e.textContent || "").trim().slice(0, 60)}`);
}"""
"""JavaScript: the first elements that make the page wider than the window."""
BROKEN_PICTURES = "() => [...document.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 80))"


class Page(HTMLParser):
    """What a page contains, and what is wrong in it alone."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.problems: list[str] = []
        self.inside_svg = 0
        self.rows: list[list[int]] = []
        """Cells of every row, for every table that is open."""
        self.in_stderr, self.stderr_lines = False, 0
        self.feed(path.read_text("utf-8"))
        if self.stderr_lines > STDERR_LINES:
            self.problems.append(f"cells print {self.stderr_lines} lines to standard error")

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Record the element."""
        values = dict(attributes)
        self.ids |= {name for key in ("id", "name") if (name := values.get(key))}
        self.links += [target for key in ("href", "src", "srcset") if (target := values.get(key))]
        if tag == "svg":
            self.inside_svg += 1
        elif tag not in TAGS and not self.inside_svg:
            self.problems.append(f"<{tag}> is no element of HTML: escape the < in the source")
        elif tag == "table":
            self.rows.append([])
        elif tag == "tr" and self.rows:
            self.rows[-1].append(0)
        elif tag in ("td", "th") and self.rows and self.rows[-1]:
            self.rows[-1][-1] += int(values.get("colspan") or 1)
        self.in_stderr |= values.get("data-mime-type") == "application/vnd.jupyter.stderr"

    def handle_data(self, data: str) -> None:
        """Count lines of standard error."""
        if self.in_stderr:
            self.stderr_lines += data.count("\n") + data.count("\r")

    def handle_endtag(self, tag: str) -> None:
        """Check a table whose rows are complete."""
        if tag == "svg":
            self.inside_svg -= 1
        elif tag == "pre":
            self.in_stderr = False
        elif tag == "table" and self.rows and len(set(cells := self.rows.pop())) > 1:
            self.problems.append(f"rows of a table have {min(cells)} to {max(cells)} cells")


def main(arguments: list[str] | None = None) -> int:
    """Check the site; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=Path("build/site"), help="folder (build/site)")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="also open the pages in a browser")
    options = parser.parse_args(arguments)
    names = sorted(path.relative_to(options.site).with_suffix("").as_posix() for path in options.site.rglob("*.html"))
    if "index" not in names:
        parser.error(f"{options.site} has no index.html; run `mkdocs build` first")
    problems = [*file_problems(options.site, names)]
    if options.screenshots is not None:
        problems += browser_problems(options.site, names, options.screenshots)
    for problem in problems:
        print(problem)
    print(f"{len(names)} pages, {len(problems)} problems")
    return int(bool(problems))


def file_problems(site: Path, names: list[str]) -> Iterator[str]:
    """Problems that show in the files."""
    pages = {site / f"{name}.html": Page(site / f"{name}.html") for name in names}
    for path, page in pages.items():
        where = path.relative_to(site)
        yield from (f"{where}: {problem}" for problem in dict.fromkeys(page.problems))
        for link in dict.fromkeys(page.links):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            start = site if url.path.startswith("/") else path.parent  # 404.html links from the root
            target = (start / unquote(url.path).lstrip("/")).resolve() if url.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{where}: {link} does not exist"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                yield f"{where}: {link} has no such anchor"


def browser_problems(site: Path, names: list[str], screenshots: Path) -> list[str]:
    """Problems that show in a browser; writes the screenshots."""
    from playwright.sync_api import sync_playwright

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Do not print requests."""

    screenshots.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    problems: list[str] = []
    with sync_playwright() as playwright:
        # Without an installed Chromium this is None, and playwright looks for its own.
        executable = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])  # CI runs as root
        for device, (width, height) in WIDTHS.items():
            context = browser.new_context(viewport={"width": width, "height": height})
            tab = context.new_page()
            errors: list[str] = []
            tab.on("console", lambda message, e=errors: e.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error, e=errors: e.append(str(error)))
            for name in names:
                errors.clear()
                tab.goto(f"{address}/{name}.html", wait_until="load")
                found = [f"reports an error: {error}" for error in dict.fromkeys(errors)]
                found += [f"is wider than the window: {element}" for element in tab.evaluate(CUT_OFF)]
                found += [f"does not show {picture}" for picture in tab.evaluate(BROKEN_PICTURES)]
                problems += [f"{name} on a {device} {problem}" for problem in found]
                if name in SHOWN:
                    tall = min(TALLEST, tab.evaluate("document.documentElement.scrollHeight"))
                    picture = screenshots / f"{name.replace('/', '-')}-{device}.png"
                    area = {"x": 0, "y": 0, "width": width, "height": tall}
                    tab.screenshot(path=picture, full_page=True, clip=area)
            context.close()
        browser.close()
    server.shutdown()
    return problems


if __name__ == "__main__":
    sys.exit(main())
