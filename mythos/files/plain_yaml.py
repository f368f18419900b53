"""Read YAML as configurations use it: plain values of bounded size, decimal numbers, no tags for other types."""

import re
from typing import Any

import yaml

from mythos.files.text import MOST_NESTED

MOST_BYTES = 2**19
"""Largest configuration. One of ours has 6 KB, and PyYAML reads 250 KB a second."""
MOST_NODES = 100_000
"""Most values in a document. An alias counts as often as it is used: a few lines of aliases can expand to billions."""

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)$")
FLOAT = re.compile(
    r"[-+]?(([0-9]+(_[0-9]+)*)\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
OTHER_NUMBER = re.compile(r"[-+]?(0[0-9_]+|0[xXbBoO][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""Texts that YAML 1.1 reads as a number in another base and a person does not: 0100 as 64, 0x10 as 16, 1:30 as 90."""

_NUMBER_TAGS = _INTEGER_TAG, _FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class PlainLoader(yaml.SafeLoader):
    """SafeLoader whose numbers are decimal (1000, 1_000, 1.5) and whose failures are all YAMLErrors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value.

        Raises ConstructorError for a text that does not fit its tag; PyYAML raises a dozen types of error for that.
        """
        try:
            if (
                node.tag in _NUMBER_TAGS
                and self.resolve(yaml.ScalarNode, node.value, (True, False)) not in _NUMBER_TAGS
            ):
                raise ValueError("it is not a decimal number")
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"cannot be read as {kind}: {error}", node.start_mark
            ) from error


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBER_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver(_FLOAT_TAG, FLOAT, list("-+0123456789."))
PlainLoader.add_implicit_resolver(_INTEGER_TAG, INTEGER, list("-+0123456789"))


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML document and its tree of nodes; None and None for an empty document.

    Raises:
        yaml.YAMLError: it is not plain YAML of bounded depth and size.
        ValueError: an escape stands for no character.
    """
    loader = PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _count_nodes(node, {}, 0) > MOST_NODES:
            raise yaml.YAMLError(f"it stands for more than {MOST_NODES:,} values, aliases counted as often as used")
        return loader.construct_document(node), node
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Number of values in a node, with an alias counted as often as it is used; `counts` are those known by id."""
    if id(node) in counts:
        if counts[id(node)] == 0:
            raise yaml.YAMLError(f"an alias refers to the value that contains it:\n{node.start_mark}")
        return counts[id(node)]
    if depth > MOST_NESTED:
        raise yaml.YAMLError(f"it is nested more than {MOST_NESTED} deep")
    counts[id(node)] = 0  # marks a node whose parts are being counted: reached again, it contains itself
    parts = [part for item in node.value for part in item] if isinstance(node, yaml.MappingNode) else node.value
    inner = [_count_nodes(part, counts, depth + 1) for part in parts] if isinstance(node, yaml.CollectionNode) else []
    counts[id(node)] = min(1 + sum(inner), MOST_NODES + 1)
    return counts[id(node)]
