"""GPT-2: the configuration, the presets, and the modules, with one forward pass for every backend.

A half of a block is one call of the backend, which owns the linear layers in it and decides what it saves for backward.
The residual stream is passed on in parts (`Stream`), so that the addition at the end of one half and the LayerNorm at
the start of the next are one op.

Hooks see the same as in a plain GPT-2: a half in which a module has one is run module by module, and saves everything
for backward regardless of `set_recompute`, because recomputation would not run the hook again.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from kernels.ops import EAGER, Ops
from kernels.sublayer import Affine, Stream, add_norm
from model.decoder import Decoder, keep_likeliest
from model.hooks import any_hooked, hooked, hooked_besides_fsdp

INIT_SEED = 42
INIT_STD = 0.02
MOST_LAYERS = 1024
"""Building modules takes time, however narrow they are, and a file of a megabyte can name thousands of layers."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a network.

    Raises:
        ValueError: a size is not positive, n_embd is not a multiple of n_head, or n_layer is above MOST_LAYERS.
    """

    block_size: int = 1024
    """longest sequence, in tokens"""
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.n_layer > MOST_LAYERS:
            raise ValueError(f"n_layer is {self.n_layer}; it must be at most {MOST_LAYERS}")

    def num_params(self) -> int:
        """Number of parameters; the tied matrix counts once."""
        C = self.n_embd
        block = 12 * C * C + 13 * C  # four matrices; their biases (9C) and two LayerNorms (4C)
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C


PRESETS = {
    "nano": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128),
    "d12": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "d24": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "d36": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "d48": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
"""Configurations that start from random weights, by name."""


class LayerNorm(nn.Module):
    """Weight and bias of a LayerNorm of width C. The backend computes it."""

    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)"""
        return self.ops.layer_norm(x, self.weight, self.bias)

    def add(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """(the stream's sum, its LayerNorm), both (..., C)"""
        if not hooked(self):
            return add_norm(self.ops, stream, (self.weight, self.bias))
        residual = stream.total()
        return residual, self(residual)


class Half(NamedTuple):
    """Half a block, but for the residual and the module that computes the branch."""

    branch: torch.Tensor | None
    bias: torch.Tensor | None
    norm: Affine
    recompute: int
    leave_bias: bool


class CausalSelfAttention(nn.Module):
    """Projections around the attention op."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, half: Half | None = None) -> torch.Tensor | Stream:
        """(B, T, C) -> (B, T, C). With `half`, x is the residual, and the result the stream after this half of a block,
        computed in one call of the backend."""
        if half is None:
            return self.c_proj(self.ops.attention(self.c_attn(x), self.n_head))
        branch, bias, norm, recompute, leave_bias = half
        linears = _affine(self.c_attn), _affine(self.c_proj)
        return self.ops.attention_sublayer(Stream(x, branch, bias), norm, *linears, self.n_head, recompute, leave_bias)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor, half: Half | None = None) -> torch.Tensor | Stream:
        """(B, T, C) -> (B, T, C); `half` as in `CausalSelfAttention`"""
        if half is None:
            return self.c_proj(self.ops.gelu(self.c_fc(x)))
        branch, bias, norm, recompute, leave_bias = half
        linears = _affine(self.c_fc), _affine(self.c_proj)
        return self.ops.mlp_sublayer(Stream(x, branch, bias), norm, *linears, recompute, leave_bias)


class Block(nn.Module):
    """x = x + attn(ln_1(x)), then x = x + mlp(ln_2(x))."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.recompute = 0
        self.ln_1 = LayerNorm(config.n_embd, ops)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = LayerNorm(config.n_embd, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        as_stream: bool = False,
    ) -> torch.Tensor | Stream:
        """Run the block.

        Args:
            residual, branch, bias: the parts of a `Stream`, (B, T, C), (B, T, C) and (C,).
            as_stream: leave the last additions to the caller.

        Returns:
            (B, T, C), or with as_stream the `Stream` whose sum it is.
        """
        stream = self._half(Stream(residual, branch, bias), self.ln_1, self.attn)
        stream = self._half(stream, self.ln_2, self.mlp)
        return stream if as_stream else stream.total()

    def _half(self, stream: Stream, norm: LayerNorm, part: nn.Module) -> Stream:
        """In one call; module by module if a hook or a replaced module wants to see one of them."""
        linears = list(part.children())
        # By the method, since FSDP makes subclasses.
        is_attention = type(part).forward is CausalSelfAttention.forward
        is_ours = is_attention or type(part).forward is MLP.forward
        is_plain = is_ours and {*map(type, linears)} == {nn.Linear}
        if type(norm) is not LayerNorm or not is_plain or any_hooked((norm, *linears)) or hooked_besides_fsdp(part):
            residual, normed = norm.add(stream)
            return Stream(residual, part(normed))
        # FSDP frees the parameters of a block after its last half, whose bias nobody could add later.
        leave_bias = is_attention or not hooked(part)
        half = Half(stream.branch, stream.bias, (norm.weight, norm.bias), self.recompute, leave_bias)
        return part(stream.residual, half)


class Transformer(nn.ModuleDict):
    """Everything of a GPT-2 but its head, by the names of its parts."""

    wte: nn.Embedding
    wpe: nn.Embedding
    h: Sequence[Block]
    ln_f: LayerNorm


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with the output matrix tied to the token embedding, in fp32 on the CPU.

    Args:
        config: the shape.
        ops: the backend.
        init: draw the initial weights. False leaves them uninitialised, for a caller that loads them all.
    """

    def __init__(self, config: GPTConfig, ops: Ops = EAGER, init: bool = True):
        super().__init__()
        self.config = config
        self.ops = ops
        self.residual_dtype: torch.dtype | None = None
        """of the residual stream; None for that of the weights. In 16 bits it needs autocast to the same dtype: the
        branches that are added have to be as narrow."""
        # On meta, since torch's own initialisation would be wasted, and would advance the global random state.
        with torch.device("meta"):
            self.transformer = Transformer(
                {
                    "wte": nn.Embedding(config.vocab_size, config.n_embd),
                    "wpe": nn.Embedding(config.block_size, config.n_embd),
                    "h": nn.ModuleList(Block(config, ops) for _ in range(config.n_layer)),
                    "ln_f": LayerNorm(config.n_embd, ops),
                }
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.to_empty(device="cpu")
        self.lm_head.weight = self.transformer.wte.weight
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        if init:
            self.init_weights()

    _was_tied: bool
    """whether the head was tied when load_state_dict began"""

    @property
    def _tied(self) -> bool:
        return getattr(self.lm_head, "weight", None) is self.transformer.wte.weight

    def _apply(self, *args: Any, **kwargs: Any) -> "GPT":
        # Called by `to`, `to_empty`, `double` and the like. Where it cannot change a parameter in place, as for another
        # type of device, it creates a new one for each module that has it.
        tied = self._tied
        super()._apply(*args, **kwargs)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the initial weights of GPT-2: one CPU generator, seed 42, in the order of `nn.Module.apply`.

        The projections into the residual stream have a standard deviation divided by √(2·n_layer), the root of the
        number of additions to it (Radford et al. 2019, section 2.3).
        """
        generator = torch.Generator().manual_seed(INIT_SEED)
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        into_residual = {id(proj) for block in self.transformer.h for proj in (block.attn.c_proj, block.mlp.c_proj)}

        def draw(module: nn.Module) -> None:
            if isinstance(module, LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
            elif isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:
                std = residual_std if id(module) in into_residual else INIT_STD
                module.weight.normal_(0.0, std, generator=generator)
                if isinstance(module, nn.Linear):
                    module.bias.zero_()

        self.apply(draw)

    def set_recompute(self, level: int) -> None:
        """Choose what backward recomputes instead of saving it: 0 nothing, 1 GELUs, 2 also LayerNorms.

        Saved activations fall from 16·C to 12·C or 10·C elements per token and layer; less so if modules have hooks.
        """
        for block in self.transformer.h:
            block.recompute = level

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        return_logits: bool = True,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the network.

        Args:
            idx: (B, T) int64 token ids, T <= block_size.
            targets: (B, T) int64, the ids to predict; −1 is ignored. None for predictions only.
            return_logits: False if the logits are not needed, so that no backend spends time or memory on them.
            positions: (n,) int64 indices into idx.flatten(), where logits are needed. Not with targets.

        Returns:
            (logits, loss). With targets: logits (B, T, V) and the mean loss in nats, (). Without: logits at
            `positions`, (n, V), or of the last position only, (B, 1, V), and None. Logits are None if return_logits is
            False.

        Raises:
            ValueError: T is larger than block_size, or both targets and positions are given.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(f"a sequence of {idx.shape[1]} tokens is longer than block_size {self.config.block_size}")
        if targets is not None and positions is not None:
            raise ValueError("with targets, logits are computed at all positions; give targets or positions, not both")
        wte, wpe = self.transformer.wte, self.transformer.wpe
        if hooked(wte) or hooked(wpe):
            residual = wte(idx) + wpe(torch.arange(idx.shape[1], device=idx.device))
            residual = residual if self.residual_dtype is None else residual.to(self.residual_dtype)
        elif self.residual_dtype is None:
            residual = self.ops.embedding(idx, wte.weight, wpe.weight)
        else:
            residual = self.ops.embedding(idx, wte.weight, wpe.weight, self.residual_dtype)
        stream = Stream(residual)
        for block in self.transformer.h:
            stream = Stream(block(stream.total())) if hooked(block) else block(*stream, as_stream=True)
        _, hidden = self.transformer.ln_f.add(stream)

        if targets is None:
            needed = hidden[:, [-1], :] if positions is None else hidden.flatten(0, 1)[positions]
            return (self.lm_head(needed) if return_logits else None), None
        if not return_logits and not hooked(self.lm_head):
            return None, self.ops.linear_cross_entropy(hidden, self.lm_head.weight, targets)
        logits = self.lm_head(hidden)
        return (logits if return_logits else None), self.ops.cross_entropy(logits, targets)

    @torch.no_grad()
    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> torch.Tensor:
        """Continue sequences by multinomial sampling from torch's global random state.

        Args:
            idx: (B, T) int64 token ids to start from. The context is cropped to the last block_size of them.
            max_new_tokens: number of tokens to add.
            temperature: > 0; logits are divided by it.
            top_k: sample only among the k most likely ids; None for all.

        Returns:
            (B, T + max_new_tokens) int64; every new id is below vocab_size.

        Raises:
            ValueError: temperature or top_k is not positive.
        """
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        decoder, next_ids = Decoder(self, idx, max_new_tokens), None
        for _ in range(max_new_tokens):
            logits = decoder.prefill() if next_ids is None else decoder.step(next_ids)
            logits = keep_likeliest(logits[:, : self.config.vocab_size].float() / temperature, top_k)
            next_ids = torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)[:, 0]
        return decoder.ids if next_ids is None else decoder.append(next_ids)

    def can_cache(self) -> bool:
        """Whether `model.decoder` may call the parts of the blocks by themselves: nothing is replaced, and no hook has
        to see a block, or to gather its weights first."""
        plain = type(self).forward is GPT.forward and all(
            type(block) is Block and type(block.attn) is CausalSelfAttention for block in self.transformer.h
        )
        return plain and not any_hooked(self.modules())


def _affine(linear: nn.Linear) -> Affine:
    return linear.weight, linear.bias


def _before_loading(gpt: GPT, *_: Any) -> None:
    gpt._was_tied = gpt._tied


def _after_loading(gpt: GPT, keys: Any) -> None:
    """Tie the head again: load_state_dict(assign=True) sets one parameter per name. If the two differ, lm_head.weight
    wins, as without assign, where it is copied last."""
    if gpt._was_tied and not gpt._tied:
        wte = gpt.transformer.wte
        if not any(key.endswith("lm_head.weight") for key in keys.missing_keys):
            wte.weight = gpt.lm_head.weight
        gpt.lm_head.weight = wte.weight
