"""The backend of a run: its table of ops, and trials of what it needs of this machine before anything is written."""

import ctypes
import sys

import torch

from common import BadInput
from kernels import ops
from training.config import Config


def choose_ops(config: Config, device_type: str) -> ops.Ops:
    """The table of ops that `--backend` and `--flash` name.

    Raises:
        BadInput: there is no such backend here, or `--flash 1` would do nothing.
    """
    try:
        table = ops.parse(config.backend, device_type)
    except (ImportError, ValueError, RuntimeError) as error:
        raise BadInput(f"--backend {config.backend}: {error}") from error
    if not config.flash:
        return table
    if table.attention not in (ops.EAGER.attention, ops.SDPA.attention):
        raise BadInput(
            f"--flash 1 replaces eager attention, and that of --backend {config.backend} is a Triton kernel; give "
            "--flash 0, --backend sdpa or --backend triton,attention=sdpa"
        )
    return table._replace(attention=ops.SDPA.attention)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the next step, which allocates the same again. It would return large tensors to
    the system, and each of their pages comes back with a fault and full of zeros. Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def require_cache_folder() -> None:
    """Check that torch has a folder for what it compiles. It makes one in every process, even if it compiles nothing.

    It imports triton: call it after `choose_ops`, which may choose Triton's interpreter.

    Raises:
        BadInput: it cannot make the folder.
    """
    try:
        torch.optim.SGD([torch.zeros(1)])  # imports torch's compiler, as every optimizer does
    except OSError as error:
        raise BadInput(
            f"torch has no folder for temporary files ({error.strerror or error}); name one that can be written to in "
            "TMPDIR, or in TORCHINDUCTOR_CACHE_DIR if that is set"
        ) from error


def try_code_generation(config: Config, device: torch.device, table: ops.Ops) -> None:
    """Compile one small op in each way that this run is going to.

    If Triton or torch.compile lacks something (a compiler, a cache folder that can be written to), the first step would
    otherwise be the first to fail, after the run directory was made and other ranks were waited for.

    Raises:
        BadInput: it fails.
    """
    x = torch.ones(8, device=device)
    flag, needed = f"--backend {config.backend}", "a C compiler (CC) and a cache folder (TRITON_CACHE_DIR)"
    try:
        table.gelu(x)
        if config.compile:
            flag, needed = "--compile 1", "a C++ compiler (CXX) and a cache folder (TORCHINDUCTOR_CACHE_DIR)"
            torch.compile(lambda x: x * table.gelu(x), fullgraph=True)(x)
    except Exception as error:  # each version of torch and of Triton has its own
        reason = str(error).partition("\n\n")[0] or type(error).__name__  # what follows is for torch's developers
        raise BadInput(f"{flag}: a trial failed: {reason}; it needs {needed}; or choose another value") from error
