"""A training run whose calls inject.c counts: LOG, two FOLDERs, FAULT, NUMBER as it has them, then the flags."""

import ctypes
import os
import sys

from mlm import cli
from mlm.train import main

log, one, other, fault, number, *flags = sys.argv[1:]
descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
if ctypes.CDLL(None).watch(one.encode(), other.encode(), descriptor, int(fault), ctypes.c_long(int(number))):
    os._exit(77)  # the kernel refuses
sys.argv = ["train.py", *flags]
cli.run(main)
