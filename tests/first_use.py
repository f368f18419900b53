"""Import this to do once, in the servers of tests/warm.py, what every fork of theirs would otherwise do at first use.

Nothing here starts a thread, and nothing reads what a test may change before it forks.
"""

import gc
import importlib
import os

import mythos.distributed.sharding  # noqa: F401
import tests.trainers  # noqa: F401
from mythos.config.checking import field_schemas
from mythos.config.sections import Config
from mythos.section import Section

# What the package imports late, because a command that does not need it should start fast.
for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
    importlib.import_module(name)
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402, F401


def read_schemas(section: type[Section]) -> None:
    """Let pydantic describe the fields of a section and of those in it, which it keeps."""
    field_schemas(section)
    for field in section.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            read_schemas(field.annotation)


read_schemas(Config)
os.fsync = lambda _: None  # as tests/conftest.py does
# Keep the collector of a fork away from what it shares with the server: a search would copy all of it.
gc.collect()
gc.freeze()
