"""Writing of tensors as safetensors files that others may read as the umask allows."""

import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor


def save_file(tensors: Mapping[str, Tensor], file: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name to a file, with the permissions of any other new file.

    safetensors writes a temporary file of mode 0600 and renames it, so that only its owner could read an export or a
    checkpoint on a shared disk. Raises OSError and SafetensorError.
    """
    path = Path(file)
    path.touch()  # a new file gets the permissions of the umask, or of the folder's default ACL
    permissions = stat.S_IMODE(path.stat().st_mode)
    safetensors.save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    with suppress(OSError):  # file systems without permissions refuse, and need none
        path.chmod(permissions)
