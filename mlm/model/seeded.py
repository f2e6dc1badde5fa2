"""Weights from a seed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_cpu_generator(seed: int) -> Iterator[None]:
    """Draw weights from `seed` and put the global generator back. Models are built on the CPU, and
    `torch.manual_seed` would also touch the generators of every GPU."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**64)  # any integer is a seed, as it is to the masks
        yield
