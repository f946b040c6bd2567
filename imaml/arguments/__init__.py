"""The arguments of the command line: words and a TOML file become the options of a command and a preset."""

from imaml.arguments.parsing import parse

__all__ = ["parse"]
