"""Adapts masked language models to a domain. README.md shows the order in which to read the modules."""

from mlm.startup import find_home

find_home()  # libraries look for it when they are imported
