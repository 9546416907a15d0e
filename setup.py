"""Everything static stands in pyproject.toml; what the machine decides, the native code, is added here."""

import sys
from pathlib import Path

from setuptools import setup

# `python setup.py` finds build_support by itself; some front ends run this file from elsewhere.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.commands import setup_arguments

setup(**setup_arguments(sys.argv[1:]))
