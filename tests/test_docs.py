"""Documented commands are accepted and say what they need; links, anchors and quoted errors exist."""

import argparse
import ast
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import yaml

from mythos.cli import COMMANDS as COMMAND_NAMES
from mythos.cli import main as command_main
from mythos.config.loading import describe, load_config, packaged_configs
from mythos.config.sections import Config
from mythos.errors import MythosError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STAND_INS = {name: "configs/debug.yaml" for name in ("CONFIG.yaml", "CONFIG", "my.yaml", "runs/NAME")}
STAND_INS |= {"retrofitted/train.yaml": "configs/debug.yaml"}
STAND_INS |= {"SECTION": "depth", "SIZE": "reference", "RUN": "runs/quickstart"}
"""Placeholders on the pages, and what the tests use for them."""


class Block(NamedTuple):
    """A fenced block of code, or code within a line."""

    where: str
    language: str
    text: str
    needs: set[str]
    """Requirements in the comment above the block: <!-- needs: network, gpu -->."""


def blocks(page: Path) -> list[Block]:
    """All code of a page: its fenced blocks in order, then code within lines."""
    name = str(page.relative_to(ROOT))
    fenced: list[Block] = []
    lines, number = page.read_text("utf-8").split("\n"), 0
    prose: list[str] = []
    while number < len(lines):
        if fence := re.fullmatch(r"(```+)(\w*)", lines[number]):
            end = lines.index(fence[1], number + 1)
            mark = re.fullmatch(r"<!-- needs: (.+) -->", lines[number - 1])
            needs = set(mark[1].split(", ")) if mark else set()
            fenced.append(Block(f"{name}:{number + 1}", fence[2], "\n".join(lines[number + 1 : end]), needs))
            number = end
        else:
            prose.append(lines[number])
        number += 1
    inline = re.findall(r"`([^`]+)`", "\n".join(prose))
    return fenced + [Block(f"{name}: `{code}`", "inline", " ".join(code.split()), set()) for code in inline]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of every command of a block; its other lines are output."""
    for line in block.text.replace("\\\n", " ").split("\n"):
        line = re.sub(r"\[[^]]*\.\.\.\]", "", line)  # [key.path=value ...]
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if not words or words[0] not in CHECKS or (block.language == "inline" and len(words) == 1):
            continue
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command_words = words[: words.index(">") if ">" in words[:end] else end]
            yield [STAND_INS.get(word, word) for word in command_words]
            words = words[end + 1 :]


@cache
def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"documented_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None, path
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def parsed(main: Callable[[list[str]], int], arguments: list[str]) -> argparse.Namespace:
    """Call `main` until its parser returns, and return the parsed options."""

    class Parsed(Exception):
        pass

    def raising(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def parse_and_raise(*values: object) -> None:
            raise Parsed(parse(*values))

        return parse_and_raise

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, raising(getattr(argparse.ArgumentParser, name)))
        with pytest.raises(Parsed) as caught:
            main(arguments)
    return caught.value.args[0]


def online(config: Config) -> bool:
    """Whether a run uses the network."""
    hub = any(source.kind == "hub" for source in config.data.named_sources.values())
    return hub or config.log.wandb.mode == "online"


# Each check takes the words after the program's name, fails if the program would reject them, and returns what running
# them needs beyond a CPU and the installed packages.


def python(words: list[str]) -> set[str]:
    if words[:2] == ["-m", "mythos"]:
        return mythos(words[2:])
    if words[0] == "-m":
        return set()
    return accepted(module(words[0]).main, words[1:], "train" if words[0] == "train.py" else words[0])


def mythos(words: list[str]) -> set[str]:
    if not words or words[0] == "COMMAND":
        return set()
    if words[0].startswith("-"):
        assert words[0] in ("--help", "--version")
        return set()
    assert words[0] in COMMAND_NAMES, words[0]
    if words[0] == "configs":
        assert not words[1:] or words[1] in packaged_configs()
    return accepted(command_main, words, words[0])


def accepted(main: Callable[[list[str]], int], words: list[str], name: str) -> set[str]:
    options = parsed(main, words)
    if name == "train" and options.help:
        describe(options.help)
    needs = {"network"} if getattr(options, "against", None) else set()  # installs the package to compare with
    if path := getattr(options, "config", None):
        overrides = getattr(options, "overrides", [])
        if path.endswith(".yaml") or path in packaged_configs():
            config = load_config(ROOT / path if path.endswith(".yaml") else path, overrides)
            reads = name in ("train", "tokenize") and not getattr(options, "dry_run", False)
            needs |= {"network"} if reads and online(config) else set()
        elif path != STAND_INS["RUN"]:
            from scripts.benchmarks.steps import configuration

            configuration(path, overrides)
    return needs


def launcher(words: list[str]) -> set[str]:
    if words == ["--help"]:
        return set()
    processes = words[0] in ("--cpu", "--processes")
    needs = {"gpu"} if words[0] != "--cpu" else set()
    assert not processes or int(words[1]) >= 1
    return needs | python(["train.py", *words[2 * processes :]])


def sbatch(words: list[str]) -> set[str]:
    assert (ROOT / words[0]).exists()
    return launcher(words[1:])


def torchrun(words: list[str]) -> set[str]:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    module_flag = ["-m"] if options.module else []
    return {"gpu"} | python([*module_flag, options.training_script, *options.training_script_args])


def accelerate(words: list[str]) -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    if len(words) == 1:
        return set()
    options = launch_command_parser().parse_args(words[1:])
    return {"gpu"} | python([options.training_script, *options.training_script_args])


def pip(words: list[str]) -> set[str]:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert name in extras
    return {"network"}


def lm_eval(words: list[str]) -> set[str]:
    """Options are those of the harness, where it is installed."""
    if importlib.util.find_spec("lm_eval"):
        from lm_eval._cli import HarnessCLI

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lm_eval", *words])
            HarnessCLI().parse_args()
    return set()


def own_file(name: str) -> Callable[[list[str]], set[str]]:
    """A check for a third-party program: the file that it reads exists."""

    def check(_: list[str]) -> set[str]:
        assert (ROOT / name).exists()
        return set()

    return check


CHECKS: dict[str, Callable[[list[str]], set[str]]] = {
    "python": python,
    "mythos": mythos,
    "./launch.sh": launcher,
    "scripts/test_with_torch.sh": own_file("scripts/test_with_torch.sh"),
    "sbatch": sbatch,
    "torchrun": torchrun,
    "accelerate": accelerate,
    "lm_eval": lm_eval,
    "pip": pip,
    "git": lambda _: {"network"},
    "mkdocs": own_file("mkdocs.yml"),
    "pre-commit": own_file(".pre-commit-config.yaml"),
    "pytest": own_file("tests"),
    "ruff": own_file("pyproject.toml"),
    "mypy": own_file("pyproject.toml"),
    "lint-imports": own_file("pyproject.toml"),
    ".ci/run": own_file(".ci/run"),
    "cd": lambda _: set(),
    "source": lambda _: set(),
}


COMMANDS = [(block, words) for block in BLOCKS if block.language in ("", "inline") for words in commands(block)]


def test_there_are_commands_of_every_kind() -> None:
    assert {words[0] for _, words in COMMANDS} == CHECKS.keys()
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_are_accepted_and_say_what_they_need(page: str) -> None:
    for block, words in COMMANDS:
        if not block.where.startswith(f"{page}:"):
            continue
        if block.language == "inline" and words[0] == "mythos" and len(words) == 2 and words[1] in COMMAND_NAMES:
            continue  # a page mentions the command by name
        needs = CHECKS[words[0]](words[1:])
        if block.language != "inline":
            missing = needs - block.needs
            assert not missing, f"{block.where}: {shlex.join(words)} needs {missing}: say so in a comment above it"


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python train.py configs/quickstart.yaml optim.learning_rate=1", MythosError),
        ("python train.py configs/nothing.yaml", MythosError),
        ("python train.py --help depths", MythosError),
        ("mythos generate runs/quickstart --prompts x", SystemExit),
        ("python scripts/nothing.py", FileNotFoundError),
        ("mythos generates runs/quickstart", AssertionError),
        ("mythos train quickstar", MythosError),
        ("mythos sweep runs/quickstart --depths 4", SystemExit),
        ("python -m mythos presets --all", SystemExit),
        ("python scripts/benchmark.py train nothing", MythosError),
        ("./launch.sh --cpu 2 configs/debug.yaml --dry-runs", SystemExit),
        ("torchrun --standalone --nproc-per-nodes 8 train.py configs/debug.yaml", SystemExit),
        ("pip install -e '.[nothing]'", AssertionError),
    ],
)
def test_wrong_commands_are_rejected(command: str, error: type[BaseException]) -> None:
    program, *words = shlex.split(command)
    with pytest.raises(error):
        CHECKS[program](words)


def test_needs_of_commands() -> None:
    page = ROOT / "docs/quickstart.md"
    assert [block.needs for block in blocks(page)[:2]] == [{"network"}, set()]
    for line, needs in {
        "python train.py configs/fineweb-edu-1b.yaml": {"network"},
        "python train.py configs/fineweb-edu-1b.yaml --dry-run": set(),
        "python train.py configs/debug.yaml log.wandb.mode=online": {"network"},
        "mythos train fineweb-edu-1b": {"network"},
        "mythos train quickstart": set(),
        "./launch.sh configs/debug.yaml": {"gpu"},
        "./launch.sh --cpu 2 configs/debug.yaml": set(),
        "torchrun --standalone --nproc-per-node 8 train.py configs/debug.yaml": {"gpu"},
    }.items():
        program, *words = shlex.split(line)
        assert CHECKS[program](words) == needs


def blocks_of(language: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language == language]
    return pytest.mark.parametrize("block", chosen, ids=[block.where for block in chosen])


@blocks_of("yaml")
def test_yaml_is_a_part_of_a_configuration(block: Block) -> None:
    overrides = [f"{section}={json.dumps(values)}" for section, values in yaml.safe_load(block.text).items()]
    load_config(ROOT / "configs/debug.yaml", overrides)


@blocks_of("python")
def test_python_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), block.where, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist_in_a_checkout(page: Path) -> None:
    """On the site `mkdocs build` checks them."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


FIGURES = ROOT / "docs" / "figures"
DIAGRAMS = [path for path in FIGURES.glob("*.svg") if not path.with_stem(f"{path.stem}-compact").exists()]
"""Drawings that a phone shows. Of others there is a compact version, which the pages name for narrow windows."""


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.stem)
def test_text_of_diagrams_is_legible_on_a_phone(path: Path) -> None:
    drawing = path.read_text("utf-8")
    width, *_ = re.findall(r'viewBox="0 0 ([\d.]+) ', drawing)
    sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)"', drawing)] or [11.0]  # text as outlines
    assert min(sizes) * min(1, 358 / float(width)) >= 8.5  # pixels, in a window of 390


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text("utf-8")):
        if not target.startswith("https://"):
            assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def test_guides_begin_with_a_command() -> None:
    """A reader who only wants the command finds it at the top, before the first section."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    [guides] = [entry["Guides"] for entry in nav if "Guides" in entry]
    assert len(guides) >= 12
    for entry in guides:
        [name] = entry.values()
        lines = (ROOT / "docs" / name).read_text("utf-8").split("\n")
        assert "```" in lines[:4], f"{name} begins with {lines[2]!r}"
        command = lines[lines.index("```") + 1]
        assert command.split()[0] in CHECKS, f"{name} begins with {command!r}"


def test_readme_is_a_front_page() -> None:
    """Short enough to read at once, and every picture has a description and is small."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) < 800
    for picture in re.findall(r"<img [^>]*>", text):
        assert re.search(r'alt="[^"]{20,}"', picture)
        assert (ROOT / re.findall(r'src="([^"]+)"', picture)[0]).stat().st_size < 100_000


def test_quoted_errors_exist_in_the_code() -> None:
    messages = []
    for path in [ROOT / "train.py", *(ROOT / "mythos").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                messages.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                messages.append(node.value)
    messages.append(re.sub(r"\$\w+", "...", (ROOT / "launch.sh").read_text("utf-8")))
    quoted = [" ".join(block.text.split()) for block in blocks(ROOT / "docs/faq.md") if block.language == "text"]
    assert len(quoted) > 20
    for message in quoted:
        assert any(message in text for text in messages), f"docs/faq.md quotes an unknown message: {message}"
