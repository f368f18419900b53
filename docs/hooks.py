"""MkDocs hooks: generated pages, and when notebooks are executed again.

The configuration reference, CONTRIBUTING.md and CHANGELOG.md of the repository root become pages.
"""

import hashlib
import inspect
import os
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from mythos.cli.presets import preset_table
from mythos.config.checking import allowed, sections, shown
from mythos.config.sections import Config
from mythos.section import Section

ROOT = Path(__file__).parent.parent
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository root and their page on the site."""
RESULTS = ("results/claims/*/verdict.md", "results/claims/*/figure.png")
"""Verdicts of claims and their pictures, which other pages show."""


NOTEBOOK_CODE = ("mythos/**/*.py", "configs/quickstart.yaml")
NOT_IN_NOTEBOOKS = ("cli", "gpu_check", "hf")
"""Packages that no notebook imports, directly or through others."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the folder of executed notebooks by the code they run.

    mkdocs-jupyter executes a notebook unless it finds the result of the same notebook in this folder.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in NOTEBOOK_CODE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT)
        if name.parts[1] not in NOT_IN_NOTEBOOKS:
            digest.update(f"{name}\n{path.read_text('utf-8')}".encode())
    # The kernel inherits this: tqdm asks for ipywidgets, whose bars a page cannot show.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    settings = config.plugins["mkdocs-jupyter"].config
    settings["cache_dir"] = f"{settings['cache_dir']}/{digest.hexdigest()[:16]}"
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository root as pages, and verdicts of claims as pages outside of the navigation."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8").replace("](docs/", "](")))
    for path in sorted(path for pattern in RESULTS for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        inclusion = InclusionLevel.NOT_IN_NAV if path.suffix == ".md" else InclusionLevel.INCLUDED
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Redirect links to root files and results to their pages, and append the reference to configuration.md."""
    for name, target in OUTSIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    markdown = markdown.replace("](../results/", "](results/")
    if page.file.src_uri == "configuration.md":
        markdown = "\n\n".join([markdown, *reference(), "## Presets", f"```text\n{preset_table()}\n```"])
    return markdown


def reference() -> list[str]:
    """Render every configuration section as Markdown, from the declarations that validate runs."""
    pieces = []
    for path, section in sections(Config):
        pieces += [_section(path, section)]
        for name, field in section.model_fields.items():
            if get_origin(field.annotation) is dict:
                pieces.append(_section(f"{path}.{name}.NAME", get_args(field.annotation)[1]))
    return pieces


def _section(path: str, section: type[Section]) -> str:
    lines = [f"{'#' * (2 + path.count('.'))} {path} {{#{path}}}", "", _escaped(inspect.getdoc(section) or ""), ""]
    rows = ["| field | allowed | default | meaning |", "|---|---|---|---|"]
    schemas = section.model_json_schema()["properties"]
    inner = dict(sections(section))
    for name, field in section.model_fields.items():
        meaning = _escaped(" ".join((field.description or "").split()))
        if name in inner:
            cells = [f"[`{name}`](#{path}.{name})", "a section", "", meaning]
        else:
            default = "" if field.is_required() else f"`{shown(field.get_default())}`"
            cells = [f"`{name}`", _escaped(allowed(schemas[name])), default, meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, '<div class="reference" markdown>\n', *rows, "\n</div>"])


def _escaped(text: str) -> str:
    """Escape `<` outside of code, where Markdown would pass `runs/<name>` on as an HTML tag."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split("(`[^`]*`)", text))


class PlainRoles(griffe.Extension):
    """Replace Sphinx roles such as :func:`name` in docstrings by the name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the roles in one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":(?:class|func|meth|mod):`([^`]+)`", r"`\1`", obj.docstring.value)
