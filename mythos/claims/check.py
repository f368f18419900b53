"""Recompute what is committed of all claims from their results, byte for byte."""

from collections.abc import Iterator
from pathlib import Path

from mythos.claims.definition import claim_names
from mythos.claims.results import FILE, read_results
from mythos.claims.verdict_page import (
    PICTURE,
    VERDICT,
    claims_overview,
    outcome_line,
    stamp_of,
    verdict_text,
    write_verdict,
)
from mythos.errors import MythosError, short_reason
from mythos.files.local import write_whole
from mythos.files.text import read_bytes, read_text

PAGE = Path("docs/claims.md")
BEGIN, END = "<!-- mythos claims check --write -->", "<!-- end -->"
"""Marks in the page around the table of all claims."""


def problems(root: Path, page: Path) -> Iterator[str]:
    """What differs from what the results and definitions yield, one line each.

    Raises MythosError if there are no results at all.
    """
    folders = sorted(path.parent for path in root.glob(f"*/{FILE}"))
    if not folders:
        raise MythosError(f"{root}: no results of claims; run in a checkout, or give the folder with --results")
    for folder in folders:
        yield from problems_of(folder)
    if page.is_file() and not _contains(page, updated_page(page, root)):
        yield f"{page}: not what the results yield"


def problems_of(folder: Path) -> Iterator[str]:
    """What differs in a folder with results."""
    results = read_results(folder)
    if results is None or results.claim not in claim_names():
        yield f"{folder / FILE}: there is no such claim in configs/claims"
        return
    claim, _, judgement = outcome_line(results.claim, folder)
    if not _contains(folder / FILE, results.dump()):
        yield f"{folder / FILE}: not as `mythos claims` writes it"
    if results.config != claim.digest():
        yield (
            f"{folder / FILE}: made with definition {results.config}; configs/claims/{claim.name}.yaml is now "
            f"{claim.digest()}: run the claim anew"
        )
        return
    verdict = folder / VERDICT
    if not _contains(verdict, verdict_text(claim, results, judgement)):
        yield f"{verdict}: not what the results yield"
    if judgement.tables and stamp_of(folder / PICTURE) != results.digest():
        yield f"{folder / PICTURE}: drawn from other results"


def _contains(path: Path, text: str) -> bool:
    """Whether a file has exactly this text."""
    try:
        return read_bytes(path) == text.encode()
    except (OSError, ValueError):  # no file, or a larger one than ours
        return False


def write(root: Path, page: Path) -> None:
    """Write verdicts, pictures and the page's table anew, from the results; those of changed definitions stay."""
    for path in sorted(root.glob(f"*/{FILE}")):
        results = read_results(path.parent)
        if results is None or results.claim not in claim_names():
            continue
        claim, _, judgement = outcome_line(results.claim, path.parent)
        if results.config == claim.digest():
            write_verdict(path.parent, claim, results, judgement)
    if page.is_file():
        write_whole(page, updated_page(page, root))


def updated_page(page: Path, root: Path) -> str:
    """The page with the present table and pictures. Raises MythosError if it lacks the marks."""
    try:
        text = read_text(page)
    except (OSError, ValueError) as error:
        raise MythosError(f"{page} cannot be read: {short_reason(error)}") from error
    if BEGIN not in text or END not in text:
        raise MythosError(f"{page}: the marks {BEGIN} and {END} around the table are missing")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{claims_overview(root)}\n{END}{rest.partition(END)[2]}"
