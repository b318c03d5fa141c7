"""Where a model goes and in what numbers: checked before anything is built, so that a mistake is one clear error."""

from __future__ import annotations

import os

import torch

from transfuse.errors import DeviceError, DtypeError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def usable_device(device: torch.device | str | int | None) -> torch.device:
    """The device meant, None being torch's default one.

    Raises:
        DeviceError: there is no such device here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        where = torch.get_default_device() if device is None else torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).split("\n")[0][:200]
        raise DeviceError(
            f"device: expected cpu, meta, cuda, cuda:1 or another that this machine has, got {device!r} ({reason}); "
            "`transfuse doctor` lists the GPUs"
        ) from error
    return where


def check_dtype(dtype: torch.dtype | None) -> None:
    """Parameters are fp64, fp32, fp16 or bf16; None leaves it to torch's default or the checkpoint.

    Raises:
        DtypeError: it is another type.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise DtypeError(f"dtype: expected torch.{', torch.'.join(DTYPES)} or None, got {dtype!r}")


def machine_memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on this system, or not these names
        return 0
