"""Names of measurements in metrics.jsonl that depend on the number of loops: `val/loss@8` is `val/loss` at 8 loops."""

from collections.abc import Mapping


def at_loops(name: str, loops: int) -> str:
    """The key of a measurement with every position run for `loops` loops."""
    return f"{name}@{loops}"


def losses_by_depth(record: Mapping[str, float]) -> dict[int, float]:
    """The `val/loss@<loops>` values of a record by number of loops, shallowest first; nats per token."""
    prefix = at_loops("val/loss", 0).removesuffix("0")
    return dict(sorted((int(key.removeprefix(prefix)), v) for key, v in record.items() if key.startswith(prefix)))
