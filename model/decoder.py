"""Next-token logits of sequences that grow by a token per step, with a cache of keys and values.

The prompts run once, through the causal kernel (prefill). Then a step runs one token per sequence, whose query attends
to the cache: the weights are read once per token, which is what a step costs.

Once a sequence is longer than block_size its window slides. The context is cropped to the last block_size tokens and
positions restart at 0, so every key and value changes, in the first layer too. From then on each of its tokens costs a
whole forward pass over block_size tokens, which is exact.

`model.gpt` imports this module, which therefore knows a network only by its parts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kernels.ops import EAGER
from kernels.sublayer import Stream
from model.cuda_graph import CudaGraphs, GraphedCall


class Decoder:
    """Sequences that grow, and the logits of their next tokens: `prefill` once, then `step` after `step`.

    Args:
        gpt: the network, a `model.gpt.GPT`. One with hooks is called as a module, without a cache: hooks may gather its
            weights (FSDP2), and see whole sequences, as before.
        prompts: (B, T) int64 ids, right-padded with any ids.
        room: number of tokens that will be added to each sequence at most.
        lengths: of the prompts, in tokens; None for T. Prompts longer than block_size have to be of one length.
        copies: continuations of each prompt, which is run once for all of them.
        graph: make a step one CUDA graph, captured after cuda_graph.WARM_UP steps.
    """

    def __init__(
        self,
        gpt: Any,
        prompts: torch.Tensor,
        room: int,
        lengths: Sequence[int] | None = None,
        copies: int = 1,
        graph: bool = False,
    ):
        B, T = prompts.shape
        self.gpt = gpt
        self.copies = copies
        self.lengths = [length for length in lengths or [T] * B for _ in range(copies)]
        """tokens of each of the B·copies sequences so far"""
        self.ids = prompts.new_zeros(B * copies, T + room)
        """(B·copies, T + room) int64: the sequences, right-padded"""
        self.ids[:, :T] = prompts.repeat_interleave(copies, dim=0)
        self.cache: torch.Tensor | None = None
        """(n_layer, 2, B·copies, H, cache_size, D), keys and values, in the dtype in which c_attn computes"""
        self.cache_size = min(gpt.config.block_size, T + room)
        self._rows = torch.arange(B * copies, device=prompts.device)
        self._lengths = torch.tensor(self.lengths, device=prompts.device)
        self._graphed_step: GraphedCall[torch.Tensor] | None = None
        if graph:
            # Over the whole cache: a graph has no shape that grows, and the kernel reads only the keys that are there.
            self._graphed_step = GraphedCall(lambda: self._step(self.cache_size), CudaGraphs(prompts.device))

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Run the prompts. Returns the logits of each sequence's next token, (B·copies, V)."""
        if not self.gpt.can_cache() or max(self.lengths, default=0) > self.gpt.config.block_size:
            return self._recompute(range(len(self.lengths)))
        longest = max(self.lengths, default=0)
        transformer = self.gpt.transformer
        idx = self.ids[:: self.copies, :longest]
        hidden = self._run(
            self.gpt.ops.embedding(idx, transformer.wte.weight, transformer.wpe.weight), self._attend_all
        )
        last = hidden[self._rows[: len(hidden)], self._lengths[:: self.copies] - 1]
        return self.gpt.lm_head(last).repeat_interleave(self.copies, dim=0)

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        """Add a token to each sequence, (B·copies,) int64. Returns all sequences, `ids`."""
        self.ids[self._rows, self._lengths] = ids
        self._lengths += 1
        self.lengths = [length + 1 for length in self.lengths]
        return self.ids

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Add a token to each sequence, (B·copies,) int64. Returns the logits of the next ones, (B·copies, V)."""
        self.append(ids)
        slid = [row for row, length in enumerate(self.lengths) if length > self.gpt.config.block_size]
        if self.cache is None or len(slid) == len(self.lengths):
            return self._recompute(range(len(self.lengths)))
        logits = self._graphed_step() if self._graphed_step else self._step(min(max(self.lengths), self.cache_size))
        if slid:
            logits = logits.index_copy(0, self._rows[slid], self._recompute(slid))
        return logits

    def _step(self, n_keys: int) -> torch.Tensor:
        """Run the last token of each sequence. What it reads and writes are the tensors of this object, so that it can
        be captured. No sequence has more than n_keys keys; one whose window slides gets logits of no meaning."""
        lengths = self._lengths.clamp(max=self.cache_size)
        at = lengths - 1
        last = self.ids[self._rows, self._lengths - 1]
        transformer = self.gpt.transformer
        residual = F.embedding(last, transformer.wte.weight) + F.embedding(at, transformer.wpe.weight)
        caches = self.cache
        assert caches is not None
        _, _, B, H, _, D = caches.shape
        where = at[:, None, None, None].expand(2, B, H, 1, D)

        def attend(layer: int, attn: Any, qkv: torch.Tensor) -> torch.Tensor:
            q, *kv = qkv.view(B, 3, H, 1, D).unbind(1)  # (B, H, 1, D) each
            cache = caches[layer].scatter_(3, where, torch.stack(kv))
            keys, values = cache[:, :, :, :n_keys]
            return attn.ops.decode_attention(q[:, :, 0], keys, values, lengths).flatten(1)

        return self.gpt.lm_head(self._run(residual, attend))

    def _attend_all(self, layer: int, attn: Any, qkv: torch.Tensor) -> torch.Tensor:
        """(B, T, 3C) -> (B, T, C): causal attention, which also fills the cache of every copy."""
        B, T, _ = qkv.shape
        kv = qkv.unflatten(-1, (3, attn.n_head, -1))[:, :, 1:].permute(2, 0, 3, 1, 4)  # (2, B, H, T, D)
        if self.cache is None:
            shape = (len(self.gpt.transformer.h), 2, B * self.copies, attn.n_head, self.cache_size, kv.shape[-1])
            self.cache = qkv.new_zeros(shape)  # finite beyond the lengths, as eager's attention needs it
        self.cache[layer].unflatten(1, (B, self.copies))[..., :T, :] = kv[:, :, None]
        return attn.ops.attention(qkv, attn.n_head)

    def _run(self, residual: torch.Tensor, attend: Callable) -> torch.Tensor:
        """(..., C) -> (..., C): all blocks and the last LayerNorm, with an attention of the caller's."""
        stream = Stream(residual)
        for layer, block in enumerate(self.gpt.transformer.h):
            residual, normed = block.ln_1.add(stream)
            heads = attend(layer, block.attn, block.attn.c_attn(normed))
            residual, normed = block.ln_2.add(Stream(residual, block.attn.c_proj(heads)))
            stream = Stream(residual, block.mlp(normed))
        return self.gpt.transformer.ln_f.add(stream)[1]

    def _recompute(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), V): by a whole forward pass over the last block_size tokens of each sequence."""
        logits: dict[int, torch.Tensor] = {}
        for length in sorted({self.lengths[row] for row in rows}):  # on every rank alike
            group = [row for row in rows if self.lengths[row] == length]
            windows = self.ids[group, max(0, length - self.gpt.config.block_size) : length]
            logits |= zip(group, self.gpt(windows)[0][:, -1], strict=True)
        return torch.stack([logits[row] for row in rows]) if rows else self.ids.new_empty(0, 0, dtype=torch.float32)


class PackedLinear(torch.nn.Module):
    """An nn.Linear for inference, with its weight in the layout in which oneDNN reads it best. The operators are those
    that torch.compile generates for frozen weights; they are no public API."""

    def __init__(self, linear: Any):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack_weights(gpt: Any) -> None:
    """Replace the linear layers of a network in fp32 on a CPU, for inference with a few rows: MKL reads a matrix for
    eight rows at half the speed. Eager's GELU goes too: its eight operators take a tenth of a step's time. Where torch
    lacks oneDNN, nothing happens. The head's copy is beside the token embedding, which is not packed."""
    if not torch.backends.mkldnn.is_available() or gpt.transformer.wte.weight.dtype != torch.float32:
        return
    for block in gpt.transformer.h:
        block.attn.c_attn, block.attn.c_proj = PackedLinear(block.attn.c_attn), PackedLinear(block.attn.c_proj)
        block.mlp.c_fc, block.mlp.c_proj = PackedLinear(block.mlp.c_fc), PackedLinear(block.mlp.c_proj)
        if gpt.ops.gelu is EAGER.gelu:
            block.mlp = torch.nn.Sequential(block.mlp.c_fc, torch.nn.GELU("tanh"), block.mlp.c_proj)
    gpt.lm_head = PackedLinear(gpt.lm_head)


def keep_likeliest(logits: torch.Tensor, top_k: int | None = None, top_p: float = 1.0) -> torch.Tensor:
    """Set the logits of unlikely ids to −inf.

    Args:
        logits: (B, V).
        top_k: keep the k likeliest, and all that are as likely as the last of them; None for all.
        top_p: of these keep the likeliest whose probabilities add up to top_p, at least one (nucleus sampling, Holtzman
            et al. 2020, https://arxiv.org/abs/1904.09751); 1 for all.

    Returns:
        (B, V)
    """
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = torch.topk(logits, top_k).values[:, [-1]]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    if top_p < 1:
        probs, order = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
        before = probs.cumsum(dim=-1) - probs
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p), -torch.inf
        )
    return logits
