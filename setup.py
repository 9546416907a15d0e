"""Everything static stands in pyproject.toml; the native build will hook in here."""

from setuptools import setup

setup()
