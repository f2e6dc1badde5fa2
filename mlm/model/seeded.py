"""Weights from a seed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_cpu_generator(seed: int) -> Iterator[None]:
    """Seeds the CPU's global generator and restores its state at the end. Models are built on the CPU;
    `torch.manual_seed` would seed every GPU as well."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**64)  # any integer, as for the masks
        yield
