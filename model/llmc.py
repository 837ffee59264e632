"""The .bin files of llm.c: model, debug state and tokenizer, written and read. docs/formats.md has them to the byte.

Every file starts with 256 little-endian int32: magic number, version, sizes, zeros. In tensor files the vocabulary is
padded to Vp, the next multiple of 128, with rows of zeros. Their order: wte, wpe, then each kind of a block's tensors
for all layers, then ln_f.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from common import BadInput, atomic_write
from kernels.ops import EAGER, Ops
from model.gpt import GPT, GPTConfig
from readers import open_regular, refuse_beyond_memory

MODEL_MAGIC, STATE_MAGIC, TOKENIZER_MAGIC = 20240326, 20240327, 20240328
MODEL_VERSIONS = {torch.float32: 3, torch.bfloat16: 5}
STATE_VERSION, TOKENIZER_VERSION = 2, 2
HEADER_BYTES = 256 * 4
VOCAB_MULTIPLE = 128
TOKENIZER_LIMIT = 64 << 20
"""bytes; GPT-2's file has 0.4 MB"""

RUN_WEIGHTS = "model.bin"
"""file name of the final weights in a run directory"""

_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
_WTE = "transformer.wte.weight"

# The tensors of a block in the order of the files, with their shapes in units of C.
_BLOCK_TENSORS = {
    "ln_1.weight": (1,),
    "ln_1.bias": (1,),
    "attn.c_attn.weight": (3, 1),
    "attn.c_attn.bias": (3,),
    "attn.c_proj.weight": (1, 1),
    "attn.c_proj.bias": (1,),
    "ln_2.weight": (1,),
    "ln_2.bias": (1,),
    "mlp.c_fc.weight": (4, 1),
    "mlp.c_fc.bias": (4,),
    "mlp.c_proj.weight": (1, 4),
    "mlp.c_proj.bias": (1,),
}


class DebugState(NamedTuple):
    """One forward and backward pass: x, y (B, T) int64; logits (B, T, V) and loss () fp32; gradients by name, fp32."""

    x: torch.Tensor
    y: torch.Tensor
    logits: torch.Tensor
    loss: torch.Tensor
    grads: dict[str, torch.Tensor]


def size_name(model: str) -> str:
    """The {size} in the names of exported files, for a value of `--model`.

    124M for gpt2 and so on; the name itself for a preset; {size} for `gpt2_{size}.bin` and `gpt2_{size}_bf16.bin`; the
    directory's name for a run directory or its model.bin.
    """
    pretrained = _SIZES.get(model.removeprefix("openai-community/"))
    if pretrained:
        return pretrained
    path = Path(model)
    if path.name == RUN_WEIGHTS:
        return path.resolve().parent.name
    if path.suffix == ".bin":
        return path.stem.removesuffix("_bf16").removeprefix("gpt2_") or path.stem
    return path.name or path.resolve().name


def padded_vocab_size(vocab_size: int) -> int:
    """Vp: vocab_size rounded up to a multiple of 128."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def tensor_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in the order of the files. The tied matrix comes once, as wte, unpadded."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        _WTE: (config.vocab_size, C),
        "transformer.wpe.weight": (config.block_size, C),
    }
    for kind, units in _BLOCK_TENSORS.items():
        for i in range(config.n_layer):
            shapes[f"transformer.h.{i}.{kind}"] = tuple(unit * C for unit in units)
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def write_model(
    path: str | Path, gpt: GPT | tuple[GPTConfig, Mapping[str, torch.Tensor]], dtype: torch.dtype = torch.float32
) -> None:
    """Write weights.

    Args:
        path: the file.
        gpt: the network, or its (config, state_dict); on any device, in any floating-point dtype.
        dtype: torch.float32, or torch.bfloat16 (rounded to nearest even).

    Raises:
        BadInput: the file cannot be written.
    """
    config, state = (gpt.config, gpt.state_dict()) if isinstance(gpt, GPT) else gpt
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    with atomic_write(path) as file:
        _write_header(file, MODEL_MAGIC, MODEL_VERSIONS[dtype], *sizes, padded_vocab_size(config.vocab_size))
        _write_tensors(file, config, state, dtype)


def read_model(path: str | Path) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    """Read weights in either precision.

    Returns:
        (config, fp32 tensors by parameter name, including lm_head.weight).

    Raises:
        BadInput: the file does not exist, is not a model file, or is not intact.
    """
    return _read_model(path, follow=True)


def _read_model(path: str | Path, follow: bool) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    with _open(path, "a model file or a run directory", follow) as file:
        header = _read_header(path, file, MODEL_MAGIC, tuple(MODEL_VERSIONS.values()), "a model file")
        dtype = next(dtype for dtype, version in MODEL_VERSIONS.items() if version == header[1])
        try:
            config = GPTConfig(*header[2:7])
        except ValueError as error:
            raise BadInput(f"{path}: impossible header: {error}; export the file again") from error
        if header[7] != padded_vocab_size(config.vocab_size):
            raise BadInput(
                f"{path}: impossible header: padded vocabulary {header[7]} where vocab_size {config.vocab_size} makes "
                f"{padded_vocab_size(config.vocab_size)}; export the file again"
            )
        _check_size(path, file, HEADER_BYTES + dtype.itemsize * _n_elements(config))
        _check_memory(path, 2 * 4 * config.num_params())  # these tensors, and the network that they are copied to
        state = dict(_read_tensors(file, config, dtype))
    state["lm_head.weight"] = state[_WTE]
    return config, state


def load_model(path: str | Path, ops: Ops = EAGER) -> GPT:
    """Build a network, in fp32 on the CPU, from a model file or from the final weights of a run directory.

    Raises:
        BadInput: as in `read_model`.
    """
    path = Path(path)
    is_run = os.path.isdir(path)
    config, state = _read_model(path / RUN_WEIGHTS if is_run else path, follow=not is_run)
    gpt = GPT(config, ops, init=False)
    gpt.load_state_dict(state)
    return gpt


def debug_state(gpt: GPT, x: torch.Tensor, y: torch.Tensor, device: torch.device | str = "cpu") -> DebugState:
    """One forward and backward of the eager backend in fp32, on a copy of the network.

    Args:
        gpt: the network. It, its gradients and all random states are left unchanged.
        x: (B, T) int64 inputs.
        y: (B, T) int64 targets.
        device: device of the copy and of the results.
    """
    copy = GPT(gpt.config, EAGER, init=False)
    copy.load_state_dict(gpt.state_dict())
    copy.to(device)
    x, y = x.to(device), y.to(device)
    with torch.autocast(torch.device(device).type, enabled=False), _exact_matmuls():
        logits, loss = copy(x, y)
        loss.backward()
    grads = {name: param.grad for name, param in copy.named_parameters() if param.grad is not None}
    return DebugState(x, y, logits.detach(), loss.detach(), grads)


def write_debug_state(path: str | Path, config: GPTConfig, state: DebugState) -> None:
    """Write a debug state.

    Raises:
        BadInput: the file cannot be written.
    """
    B, T = state.x.shape
    with atomic_write(path) as file:
        _write_header(file, STATE_MAGIC, STATE_VERSION, B, T)
        for ids in (state.x, state.y):
            file.write(_to_bytes(ids, torch.int32))
        for values in (*state.logits, state.loss):  # sequence by sequence, since the logits are the largest tensor
            file.write(_to_bytes(values, torch.float32))
        _write_tensors(file, config, state.grads, torch.float32)


def read_debug_state(path: str | Path, config: GPTConfig) -> DebugState:
    """Read a debug state of a network of this shape.

    Raises:
        BadInput: the file does not exist, is not a debug state of this network, or is not intact.
    """
    with _open(path, "a debug state") as file:
        header = _read_header(path, file, STATE_MAGIC, (STATE_VERSION,), "a debug state")
        B, T, V = *header[2:4], config.vocab_size
        if min(B, T) < 1:
            raise BadInput(f"{path}: impossible header: B {B}, T {T}; export the file again")
        n_values = 2 * B * T + B * T * V + 1 + _n_elements(config)
        _check_size(path, file, HEADER_BYTES + 4 * n_values)
        _check_memory(path, 4 * n_values)
        x, y = (_from_file(file, (B, T), torch.int32).long() for _ in range(2))
        logits, loss = _from_file(file, (B, T, V), torch.float32), _from_file(file, (), torch.float32)
        return DebugState(x, y, logits, loss, dict(_read_tensors(file, config, torch.float32)))


def write_tokenizer(path: str | Path, tokens: list[bytes], end_of_text: int) -> None:
    """Write the bytes of every token.

    Args:
        path: the file.
        tokens: by id, each of 1 to 255 bytes.
        end_of_text: id of the end-of-text token.

    Raises:
        BadInput: the file cannot be written.
        ValueError: a token's length does not fit into a byte, or end_of_text is not an id of a token.
    """
    for token, content in enumerate(tokens):
        if not 1 <= len(content) <= 255:
            raise ValueError(f"token {token} has {len(content)} bytes; the format takes 1 to 255")
    if not 0 <= end_of_text < len(tokens):
        raise ValueError(f"end_of_text {end_of_text} is none of the {len(tokens)} tokens")
    with atomic_write(path) as file:
        _write_header(file, TOKENIZER_MAGIC, TOKENIZER_VERSION, len(tokens), end_of_text)
        file.write(b"".join(bytes([len(content)]) + content for content in tokens))


def read_tokenizer(path: str | Path) -> tuple[list[bytes], int]:
    """Read the bytes of every token, by id, and the id of end-of-text.

    Raises:
        BadInput: the file does not exist, is not a tokenizer, or is not intact.
    """
    with _open(path, "a tokenizer") as file:
        header = _read_header(path, file, TOKENIZER_MAGIC, (TOKENIZER_VERSION,), "a tokenizer")
        if os.fstat(file.fileno()).st_size > TOKENIZER_LIMIT:
            raise BadInput(f"{path}: larger than the {TOKENIZER_LIMIT:,} bytes that a tokenizer may have; name another")
        content = file.read()
    n_tokens, end_of_text = header[2:4]
    if not 0 <= end_of_text < n_tokens:
        raise BadInput(
            f"{path}: impossible header: end-of-text {end_of_text} of {n_tokens} tokens; export the file again"
        )
    tokens: list[bytes] = []
    at = 0
    while at < len(content):
        length = content[at]
        if length == 0:
            raise BadInput(f"{path}: token {len(tokens)} has no bytes; export the file again")
        tokens.append(content[at + 1 : at + 1 + length])
        at += 1 + length
    if at > len(content) or len(tokens) != n_tokens:
        whole = len(tokens) - (at > len(content))
        cut = "cut short" if whole < n_tokens else "longer than its header says"
        raise BadInput(
            f"{path}: {cut}: {HEADER_BYTES + len(content)} bytes hold {whole} tokens, and its header calls for "
            f"{n_tokens}; copy or export it again"
        )
    return tokens, end_of_text


@contextlib.contextmanager
def _exact_matmuls() -> Iterator[None]:
    """fp32 matmuls without TF32, regardless of the settings of the run."""
    # Not torch.get_float32_matmul_precision, which raises after one of the newer setters.
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # it has one
    precisions = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, precisions, strict=True):
            setting.fp32_precision = precision


def _write_header(file: BinaryIO, *values: int) -> None:
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    file.write(header.tobytes())


def _write_tensors(file: BinaryIO, config: GPTConfig, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Writes tensor by tensor, so that no second copy of the network is in memory."""
    for name in tensor_shapes(config):
        file.write(_to_bytes(tensors[name], dtype))
        if name == _WTE:
            file.write(bytes(_n_padding(config) * dtype.itemsize))


def _to_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().data


def _open(path: str | Path, what: str, follow: bool = True) -> BinaryIO:
    try:
        return open_regular(path, follow)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}; name {what}") from error


def _read_header(path: str | Path, file: BinaryIO, magic: int, versions: tuple[int, ...], what: str) -> list[int]:
    content = file.read(HEADER_BYTES)
    if len(content) < HEADER_BYTES:
        raise BadInput(
            f"{path}: cut short: {len(content)} bytes, and a header alone has {HEADER_BYTES}; name {what} that is "
            "intact"
        )
    header = np.frombuffer(content, "<i4").tolist()
    if header[0] != magic:
        raise BadInput(f"{path}: magic number {header[0]} instead of {magic}; name {what}")
    if header[1] not in versions:
        known = " or ".join(map(str, versions))
        raise BadInput(f"{path}: version {header[1]} instead of {known}; export the file again")
    return header


def _check_size(path: str | Path, file: BinaryIO, needed: int) -> None:
    at = file.tell()
    there = file.seek(0, 2)
    file.seek(at)
    if there != needed:
        cut = "cut short" if there < needed else "longer than its header says"
        raise BadInput(f"{path}: {cut}: {there} bytes, and its header calls for {needed}; copy or export it again")


def _check_memory(path: str | Path, n_bytes: int) -> None:
    try:
        refuse_beyond_memory(n_bytes)
    except ValueError as error:
        raise BadInput(f"{path}: {error}; name a smaller one") from error


def _n_padding(config: GPTConfig) -> int:
    """Elements in the rows of zeros after wte."""
    return (padded_vocab_size(config.vocab_size) - config.vocab_size) * config.n_embd


def _n_elements(config: GPTConfig) -> int:
    """Elements of all tensors in a file, including padding."""
    return config.num_params() + _n_padding(config)


def _read_tensors(file: BinaryIO, config: GPTConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in tensor_shapes(config).items():
        yield name, _from_file(file, shape, dtype).float()
        if name == _WTE:
            file.seek(_n_padding(config) * dtype.itemsize, 1)


def _from_file(file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    content = bytearray(math.prod(shape) * dtype.itemsize)
    file.readinto(content)  # type: ignore[attr-defined]  # typing.BinaryIO lacks it
    return torch.frombuffer(content, dtype=dtype).view(shape)
