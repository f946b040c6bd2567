"""Arguments of the command line. :func:`parse` turns the typed words and a TOML file into options and a preset."""

from imaml.arguments.parsing import parse

__all__ = ["parse"]
