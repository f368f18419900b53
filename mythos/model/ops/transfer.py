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


class Passage:
    """A call whose rows travel between ranks, at most one transfer at a time."""

    travelling: Transfer | None = None
    """Rows on their way, or gradients on their way back."""

    def sent(self, transfer: Transfer) -> Tensor:
        """What will arrive; `arrived` waits for it.

        The autograd graph refers to this object. So neither tensor of the transfer may be part of the graph: a pass
        that ends early would leave a cycle, which is never freed.
        """
        self.travelling = transfer
        return transfer.received.detach()

    def arrived(self) -> Tensor:
        """Wait for what is on its way."""
        assert self.travelling is not None, "something was sent"
        transfer, self.travelling = self.travelling, None
        return transfer.wait()
