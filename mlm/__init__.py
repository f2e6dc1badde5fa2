"""Adapts masked language models to a domain. README.md shows the order in which to read the modules."""
