"""transformers' GPT-2 on a table of ops, in place. `model.hf.use_kernels` and `without_kernels` are the way in.

Modules change their class (`__class__`) to a subclass and keep their parameters and hooks. Unlike a `forward` in the
instance, this is also right in copies, such as DataParallel's. Attention is an implementation in the registry of
transformers, which the configuration names.
"""

import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.utils import logging

from kernels.dispatch import MAX_HEAD_DIM
from kernels.eager import IGNORE_INDEX, LAYER_NORM_EPS
from kernels.ops import Ops, triton_ops
from model.hooks import hooked

IMPLEMENTATION = "tritongpt"
"""name in transformers' registry of attention"""
THEIR_IGNORE_INDEX = -100
"""transformers' label that is not counted"""

logger = logging.get_logger(f"transformers.{__name__}")  # below theirs, so that their verbosity counts


class KernelLayerNorm(nn.LayerNorm):
    kernel_ops: Ops

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., C) -> same shape"""
        return self.kernel_ops.layer_norm(input, self.weight, self.bias)


class _KernelGELU(nn.Module):
    kernel_ops: Ops

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """any shape -> same shape"""
        return self.kernel_ops.gelu(input)


class KernelNewGELU(_KernelGELU, NewGELUActivation):
    pass


class KernelGELUTanh(_KernelGELU, GELUTanh):
    pass


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):
    """`save_pretrained` writes the name of the class into config.json, so it is the name of the base."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # After `remove` there is no table. accelerate, in mixed precision, still calls this function then.
        ops: Ops | None = getattr(self, "kernel_ops", None)
        if ops is None or not _only_loss_is_needed(self, kwargs):
            return transformers.GPT2LMHeadModel.forward(self, *args, **kwargs)
        labels, n_items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
        outputs = self.transformer(*args, **kwargs)
        loss = _shifted_loss(ops, outputs.last_hidden_state, self.lm_head.weight, labels, n_items)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(loss=loss, **others)


functools.update_wrapper(GPT2LMHeadModel.forward, transformers.GPT2LMHeadModel.forward)  # Trainer reads the signature

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: KernelLayerNorm,
    NewGELUActivation: KernelNewGELU,
    GELUTanh: KernelGELUTanh,
    GPT2Attention: GPT2Attention,  # only gets the table, which `_attention` reads
    transformers.GPT2LMHeadModel: GPT2LMHeadModel,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def install(model: transformers.GPT2LMHeadModel, ops: Ops | None) -> None:
    """`model.hf.use_kernels`"""
    if not isinstance(model, transformers.GPT2LMHeadModel):
        raise TypeError(
            f"use_kernels takes a GPT2LMHeadModel of transformers, not {type(model).__name__}; call it with the model "
            "itself, before a wrapper takes it"
        )
    if ops is None:
        if not torch.cuda.is_available():
            raise ValueError(
                "use_kernels finds no GPU for the kernels; give it a table: ops=kernels.ops.SDPA for plain PyTorch, "
                'or ops=kernels.ops.triton_ops("cpu") for Triton\'s interpreter, which is slow'
            )
        ops = triton_ops("cuda")
    remove(model)
    left = {}
    for module in model.modules():
        ours = _OURS.get(type(module))
        if ours and "forward" in vars(module):  # accelerate's hooks for device_map
            left[f"forward of {type(module).__name__}"] = "something has replaced it; call use_kernels earlier"
        elif ours is KernelLayerNorm and module.eps != LAYER_NORM_EPS:
            left["LayerNorm"] = f"layer_norm_epsilon is {module.eps}, and the kernel has {LAYER_NORM_EPS}"
        elif ours:
            module.__class__ = ours
            vars(module)["kernel_ops"] = ops
    if type(model) not in (GPT2LMHeadModel, transformers.GPT2LMHeadModel):
        left["the loss"] = f"{type(model).__name__} is a subclass of GPT2LMHeadModel"
    if not any(isinstance(module, _KernelGELU) for module in model.modules()):
        left["the activation"] = f"activation_function is {model.config.activation_function}, not gelu_new"
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        model.set_attn_implementation(IMPLEMENTATION)
    else:
        left["attention"] = f"attn_implementation is {model.config._attn_implementation}, not sdpa"
    for part, reason in left.items():
        logger.warning_once(f"use_kernels leaves {part} to transformers: {reason}")


def remove(model: transformers.GPT2LMHeadModel) -> None:
    """`model.hf.without_kernels`"""
    for module in model.modules():
        if vars(module).pop("kernel_ops", None):
            module.__class__ = _THEIRS.get(type(module), type(module))
    if model.config._attn_implementation == IMPLEMENTATION:
        model.set_attn_implementation("sdpa")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the GPT2Attention that calls.
        query: (B, H, T, D).
        key, value: (B, H, T, D); with a cache, the keys and values before are in front.
        attention_mask: None for the causal one.
        dropout: its probability; 0 in evaluation.
        scaling: of the scores; None for 1/√D.

    Returns:
        (B, T, H, D), and None for the probabilities.
    """
    ops: Ops | None = getattr(module, "kernel_ops", None)  # none in another model that was made from this config
    reason = _reason_to_skip(module, query, key, attention_mask, dropout, scaling) if ops else None
    if ops is None or reason:
        if reason and not torch.compiler.is_compiling():
            logger.warning_once(f"use_kernels leaves attention to transformers' sdpa, because of {reason}")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[2] == key.shape[2]:
        return ops.causal_attention(query, key, value).transpose(1, 2), None
    lengths = torch.full(key.shape[:1], key.shape[2], device=key.device)
    return ops.decode_attention(query.squeeze(2), key, value, lengths).unsqueeze(1), None


def _reason_to_skip(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> str | None:
    """Why the ops cannot compute this attention; None if they can. Arguments as in `_attention`."""
    T, head_dim = query.shape[2:]
    if module.is_cross_attention:
        return "cross-attention"
    if attention_mask is not None:
        return "padding, or another mask than the causal one"
    if dropout:
        return f"attention dropout: load the model with attn_pdrop=0.0 instead of {dropout}"
    if scaling not in (None, head_dim**-0.5):
        return "scores that are not scaled by 1/√head_dim"
    if head_dim > MAX_HEAD_DIM:
        return f"a head_dim of {head_dim}: kernels take {MAX_HEAD_DIM} at most"
    if T not in (1, key.shape[2]):
        return "a cache that is longer than the queries"
    if key.shape[2] > T and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return "gradients through a cache"
    return None


def _only_loss_is_needed(model: transformers.GPT2LMHeadModel, kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments is one of training whose loss can be had without logits."""
    return (
        model.training
        and kwargs.get("labels") is not None
        and False not in (model.config.return_dict, kwargs.get("return_dict"))
        and not kwargs.keys() & {"logits_to_keep", "shift_labels", "ignore_index"}
        and model.loss_function is ForCausalLMLoss
        and type(model.lm_head) is nn.Linear
        and not hooked(model.lm_head)
    )


def _shifted_loss(
    ops: Ops, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, n_items: torch.Tensor | int | None
) -> torch.Tensor:
    """transformers' ForCausalLMLoss of the logits hidden·weightᵀ.

    Args:
        ops: the table.
        hidden: (..., T, C).
        weight: (V, C).
        labels: (..., T); each is the target of the position before.
        n_items: by how much the sum of losses is divided; None for the number of labels that count.
    """
    labels = F.pad(labels, (0, 1), value=THEIR_IGNORE_INDEX)[..., 1:].to(hidden.device)
    counted = labels != THEIR_IGNORE_INDEX
    # Their label of −1 is out of range, and has to stay so.
    targets = labels.masked_fill(labels == IGNORE_INDEX, THEIR_IGNORE_INDEX)
    mean = ops.linear_cross_entropy(hidden, weight, targets.masked_fill(~counted, IGNORE_INDEX))
    if n_items is None:
        return mean
    n_counted = counted.sum()
    if isinstance(n_items, torch.Tensor):
        n_items = n_items.to(hidden.device)
    return torch.where(n_counted > 0, mean, 0.0) * (n_counted / n_items)  # the mean of no losses is NaN, their sum is 0
