"""Adapt masked language models to a domain. The rooms are read in the order that README.md gives."""
