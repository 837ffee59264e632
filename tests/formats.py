"""A reader for each file in docs/formats.md, written from that page alone: with struct, NumPy and json, and with torch
for the tensors of a checkpoint.

A file that a reader must refuse fails an assertion here, and so does one in which a writer left something else than the
zeros that the page asks for.
"""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")


class Network(NamedTuple):
    """The sizes in a model file's header."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int


class DebugState(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    logits: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]


def shard(path: Path) -> list[int]:
    """The tokens."""
    content = path.read_bytes()
    _, n = _header(content, 20240520, (1,), 2)
    assert len(content) == 1024 + 2 * n
    return list(struct.unpack_from(f"<{n}H", content, 1024))


def model(path: Path) -> tuple[Network, dict[str, np.ndarray]]:
    """The network, and its tensors by name in fp32, of which wte has no padding."""
    content = path.read_bytes()
    version, *sizes, padded = _header(content, 20240326, (3, 5), 7)
    network = Network(*sizes)
    assert min(network) >= 1 and network.n_embd % network.n_head == 0
    assert padded == (network.vocab_size + 127) // 128 * 128
    return network, _tensors(content, 1024, network, "<f4" if version == 3 else "<u2")


def debug_state(path: Path, network: Network) -> DebugState:
    content = path.read_bytes()
    _, B, T = _header(content, 20240327, (2,), 3)
    assert B >= 1 and T >= 1
    V = network.vocab_size
    x, y = (np.frombuffer(content, "<i4", B * T, 1024 + 4 * B * T * k).reshape(B, T) for k in (0, 1))
    logits = np.frombuffer(content, "<f4", B * T * V, 1024 + 8 * B * T).reshape(B, T, V)
    (loss,) = struct.unpack_from("<f", content, 1024 + 4 * B * T * (2 + V))
    return DebugState(x, y, logits, loss, _tensors(content, 1028 + 4 * B * T * (2 + V), network, "<f4"))


def tokenizer(path: Path) -> tuple[list[bytes], int]:
    """The tokens, and the id of end-of-text."""
    content = path.read_bytes()
    _, n, end_of_text = _header(content, 20240328, (2,), 3)
    assert 0 <= end_of_text < n
    tokens, at = [], 1024
    for _ in range(n):
        assert content[at] > 0
        tokens.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    assert at == len(content)
    return tokens, end_of_text


def questions(path: Path) -> list[tuple[int, list[int], list[list[int]]]]:
    """Label, context and endings of each question."""
    content = path.read_bytes()
    _, n, longest = _header(content, 20240522, (1,), 3)
    assert 1 <= n <= 65535
    at, found, lengths = 1024, [], []
    for i in range(n):
        start, n_bytes, place, label, n_endings = struct.unpack_from("<5H", content, at)
        assert (start, place, n_endings) == (65535, i, 4) and label <= 3
        inside, parts = at + 10, []
        for _ in range(5):
            (length,) = struct.unpack_from("<H", content, inside)
            parts.append(list(struct.unpack_from(f"<{length}H", content, inside + 2)))
            inside += 2 + 2 * length
        assert inside == at + n_bytes and all(parts)
        found.append((label, parts[0], parts[1:]))
        lengths.append(n_bytes)
        at = inside
    assert at == len(content) and longest == max(lengths)
    return found


def main_log(path: Path) -> list[tuple[int, str, float]]:
    """Number, kind and loss of each line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = [re.fullmatch(r"s:(\d+) (trl|tel):(\d+\.\d{6}|nan|-?inf)", line).groups() for line in lines]
    return [(int(i), kind, float(loss)) for i, kind, loss in parsed]


def json_object(content: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    value = json.loads(content, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json_object(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The updates, and the evaluations."""
    lines = json_lines(path)
    return [line for line in lines if "evals" not in line], [line for line in lines if "evals" in line]


def scores(path: Path) -> tuple[str, list[list[tuple[float | None, bool]]]]:
    """The fingerprint of an evaluation, and the scores of each item."""
    first, *lines = json_lines(path)
    by_number = {line["item"]: [(ll, greedy) for ll, greedy in line["scores"]] for line in lines}
    assert sorted(by_number) == list(range(len(lines)))
    return first["fingerprint"], [by_number[i] for i in range(len(lines))]


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The content of state.json, and the tensors by name."""
    sums = [re.fullmatch("([0-9a-f]{64})  (.+)", line) for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert {line[2] for line in sums} == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for line in sums:
        assert hashlib.sha256((folder / line[2]).read_bytes()).hexdigest() == line[1]
    state = json_object((folder / "state.json").read_text(encoding="utf-8"))
    assert folder.name == f"step_{state['step']}"
    names = {"folder": str(folder)}
    exec(re.search("```python\n(.*?)```", PAGE, re.DOTALL)[1], names)  # the page's own lines
    return state, names["tensors"]  # type: ignore[return-value]


def _header(content: bytes, magic: int, versions: tuple[int, ...], n_named: int) -> list[int]:
    """The version and the other numbers that a table names; the rest are zero."""
    first, *numbers = struct.unpack_from("<256i", content)
    assert first == magic and numbers[0] in versions
    assert not any(numbers[n_named:])
    return numbers[:n_named]


def _tensors(content: bytes, at: int, network: Network, dtype: str) -> dict[str, np.ndarray]:
    """The tensors of a model file from a byte on, up to its end. Of bf16, `dtype` is that of its bits."""
    S, V, L, _, C = network
    shapes = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    Vp = (V + 127) // 128 * 128
    order: list[tuple[str, tuple[int, ...]]]
    order = [("transformer.wte.weight", (Vp, C)), ("transformer.wpe.weight", (S, C))]
    order += [(f"transformer.h.{i}.{name}", shape) for name, shape in shapes.items() for i in range(L)]
    order += [("transformer.ln_f.weight", (C,)), ("transformer.ln_f.bias", (C,))]
    values = np.frombuffer(content, dtype, offset=at)
    assert len(values) == (Vp + S) * C + L * (12 * C * C + 13 * C) + 2 * C
    if dtype == "<u2":
        values = (values.astype("<u4") << 16).view("<f4")
    tensors = {}
    for name, shape in order:
        n = int(np.prod(shape))
        tensors[name], values = values[:n].reshape(shape), values[n:]
    padding = tensors["transformer.wte.weight"][V:]
    assert not padding.any()
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V]
    return tensors
