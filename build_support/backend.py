"""PEP 517 backend: setuptools, plus nvcc from PyPI when ``BERTKD_NVCC=pypi`` asks for it.

Build requirements cannot depend on the environment in pyproject.toml; these hooks are where they can.
"""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# One toolkit release: the parts of nvcc must agree with each other.
NVCC_FROM_PYPI = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def _extra() -> list[str]:
    wanted = os.environ.get("BERTKD_NVCC") == "pypi"
    built = (os.environ.get("BERTKD_BUILD") or "auto") in ("auto", "cuda")
    return NVCC_FROM_PYPI if wanted and built else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _extra()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _extra()
