"""What training measures between two lines of the log."""

import time
from typing import NamedTuple

import torch


class Window(NamedTuple):
    """The training between two readings, over all processes."""

    nats: float  # summed over the masked tokens
    masked: int
    tokens: int
    seconds: float

    @property
    def loss(self) -> float:
        return self.nats / max(self.masked, 1)


class Meter:
    """Keeps what a step measures on the device, so that no step has to wait until it is read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.measured: list[torch.Tensor] = []
        self.masked, self.tokens, self.started = 0, 0, time.perf_counter()

    def add(self, nats: torch.Tensor, broken: torch.Tensor, masked: int, tokens: int) -> None:
        """What a step of all processes gave: nats [] and whether it, or one before it, was not finite []."""
        self.measured.append(torch.stack([nats, broken]))
        self.masked += masked
        self.tokens += tokens

    def read(self) -> tuple[Window, int]:
        """The window, and how many of its steps, the last ones, were not finite. Here the host waits for the
        device."""
        nats, broken = torch.stack(self.measured).cpu().double().sum(dim=0).tolist()
        return Window(nats, self.masked, self.tokens, time.perf_counter() - self.started), int(broken)
