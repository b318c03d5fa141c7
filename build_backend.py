"""In-tree build backend: setuptools' own, plus NVIDIA's compiler packages when TRANSFUSE_CUDA=pip asks for them."""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a build backend's hooks are its module attributes)

# CUDA 13.0 on purpose: drivers read PTX of their own CUDA minor version and older, so the oldest 13.x serves every
# driver that CUDA 13 supports (580 and newer). The five packages share one folder, nvidia/cu13: nvcc, ptxas and
# cudafe++; headers and libcudart_static.a; the crt headers; cicc and libdevice; nv/target.
NVCC_PACKAGES = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def _nvcc_packages() -> list[str]:
    return NVCC_PACKAGES if os.environ.get("TRANSFUSE_CUDA", "").strip().lower() == "pip" else []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _nvcc_packages()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _nvcc_packages()
