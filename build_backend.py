"""In-tree build backend: setuptools' own, plus NVIDIA's compiler packages when TRANSFUSE_CUDA=pip asks for them."""

from __future__ import annotations

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a build backend's hooks are its module attributes)

NVCC_PACKAGES = [
    f"nvidia-cuda-{part}>=13.0,<14" for part in ("nvcc", "runtime", "crt", "nvvm", "cccl")
]


def _nvcc_packages() -> list[str]:
    return NVCC_PACKAGES if os.environ.get("TRANSFUSE_CUDA", "").strip().lower() == "pip" else []


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _nvcc_packages()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _nvcc_packages()
