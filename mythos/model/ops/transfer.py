"""Rows that travel between ranks while others are computed."""

import torch.distributed as dist
from torch import Tensor


class Transfer:
    """Rows on their way between ranks."""

    def __init__(self, received: Tensor, rows: Tensor, work: dist.Work | None) -> None:
        self.received, self.rows, self.work = received, rows, work

    def wait(self) -> Tensor:
        """The rows that arrived. On a GPU the stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        self.rows = self.received[:0]  # what was sent may be freed
        return self.received
