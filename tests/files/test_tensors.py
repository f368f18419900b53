import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mythos.files.tensors import save_file


@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_of_the_umask(umask: int, permissions: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == permissions
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [0, 1, 2]
