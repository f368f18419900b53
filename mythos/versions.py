"""What a run was made with: the versions of Python and of packages."""

import platform
from collections.abc import Iterable
from importlib import metadata


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, by name."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # most are optional: a run need not have what it does not use
            continue
    return versions
