"""Building configurations, and the problems that an error lists."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mythos.config.loading import config_from_dict, load_config
from mythos.config.sections import Config
from mythos.errors import MythosError


def build(**sections: Any) -> Config:
    return config_from_dict({"train": {"steps": 10}, **sections})


def problems(data: dict[str, Any], overrides: tuple[str, ...] = (), path: Path | None = None) -> list[str]:
    """The lines of the error, without the first, which counts them."""
    with pytest.raises(MythosError) as caught:
        if path is None:
            config_from_dict(data)
        else:
            path.write_text(yaml.safe_dump(data))
            load_config(path, overrides)
    first, *lines = str(caught.value).split("\n")
    assert f"{len(lines)} problem" in first
    return [line.removeprefix("  ") for line in lines]


def problem(**sections: Any) -> str:
    (line,) = problems({"train": {"steps": 10}, **sections})
    return line
