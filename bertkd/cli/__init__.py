"""The command line: one file per command, each with a typed ``Config`` and a ``prepare``."""
