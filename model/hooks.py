"""Whether a module has hooks. Fused and recomputed modules would skip them.

The test is the one by which `nn.Module.__call__` calls `forward` directly; torch has no public name for it.
"""

from collections.abc import Iterable

import torch.nn as nn
from torch.nn.modules import module as of_all


def hooked(module: nn.Module) -> bool:
    """Whether calling the module runs a hook, its own or a global one."""
    return any_hooked((module,))


def any_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether any of the modules is `hooked`. Checks the global hooks once."""
    return _all_are_hooked() or any(
        m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks for m in modules
    )


def hooked_besides_fsdp(module: nn.Module) -> bool:
    """Like `hooked`, but without the hooks of FSDP2, which gather and free weights and change no activation."""
    if not hooked(module):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return (
        _all_are_hooked()
        or bool(module._backward_pre_hooks or module._backward_hooks)
        or not all(str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.") for hook in hooks)
    )


def _all_are_hooked() -> bool:
    return bool(
        of_all._global_forward_pre_hooks
        or of_all._global_forward_hooks
        or of_all._global_backward_pre_hooks
        or of_all._global_backward_hooks
    )
