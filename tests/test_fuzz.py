"""Files from others: whatever is in them, one line or a network, no code, no hang, no memory that their size does not
justify, and nothing outside the folder."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import train
from common import BadInput
from data.loader import ShardLoader
from data.shards import open_shard
from model import hf, llmc
from model.gpt import GPT, GPTConfig
from model.load import load
from tests.conftest import TINY, command_line
from tests.training.conftest import make_sums_fit
from training import checkpoint
from training.checkpoint import Checkpoints, TrainState
from training.config import Resume
from training.distributed import World
from training.faults import UpdateGuard
from training.log import RunLog
from training.run_dir import torchrun_id_of
from training.saved import read_state

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs, alarms and memory are POSIX")

HANG_S = 20
WORLD = World(0, 0, 1, torch.device("cpu"), distributed=False)
STEP = 2


@pytest.fixture(autouse=True)
def _no_hang():
    """A read that waits for ever ends in an exception."""

    def late(*_):
        raise TimeoutError(f"still reading after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run directory with a checkpoint."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    flags = {"--num_iterations": STEP, "--checkpoint_every": STEP, "--output_dir": folder, "--backend": "eager"}
    train.main(command_line(tiny | flags))
    return folder


@pytest.fixture(scope="module")
def saved(run) -> Path:
    return run / "checkpoints" / f"step_{STEP}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder as transformers writes it, in one file."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    folder.mkdir()
    gpt = GPT(GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=4))
    tensors = {name: hf._transposed(name, p.detach()).contiguous() for name, p in gpt.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = {"n_positions": 8, "vocab_size": 5, "n_layer": 1, "n_head": 2, "n_embd": 4, "n_inner": None}
    others = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    (folder / "config.json").write_text(json.dumps(sizes | others))
    return folder


@pytest.fixture
def copied(model, tmp_path) -> Path:
    """The same, in a folder that a test may change."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def configure(model: Path, **fields) -> None:
    """Change fields of its config.json."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def split(model: Path) -> None:
    """Put the tensors into two files with an index."""
    tensors = tensors_of(model)
    (model / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def into_bin(model: Path, zipped: bool = True) -> None:
    torch.save(tensors_of(model), model / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (model / "model.safetensors").unlink()


def new_state() -> TrainState:
    gpt = GPT(TINY, init=False)
    adamw = torch.optim.AdamW(gpt.parameters())
    adamw.param_groups[0]["fused"] = False
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    params: dict[str, torch.Tensor] = dict(gpt.named_parameters())
    loader: Any = SimpleNamespace()
    return TrainState(gpt, params, adamw, scaler, loader, UpdateGuard(3.0, 3.0), torch.device("cpu"))


@contextlib.contextmanager
def generators_kept():
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def resume(folder: Path) -> TrainState:
    """Choose a checkpoint, and load it."""
    state = new_state()
    chosen = checkpoint.choose(Resume.parse(str(folder)), None, WORLD)
    with generators_kept():
        Checkpoints(None, WORLD, {}).load(chosen, state)
    return state


def from_pretrained(folder: Path) -> GPT:
    return hf.from_pretrained(str(folder))


def refusal(read, *args) -> str:
    """The one line of a refusal, in which nothing controls a terminal."""
    with pytest.raises(BadInput) as refused:
        read(*args)
    line = " ".join(str(refused.value).split())
    assert line.isprintable() and len(line) < 2000, line
    return line


# Crafted files: what is planted where, and what is said of it


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plant_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def plant_link(path: Path) -> None:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def plant_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("plant", [plant_fifo, plant_link, plant_device])
@pytest.mark.parametrize(
    ("place", "file"),
    [
        *[("checkpoint", name) for name in ("SHA256SUMS", ".metadata", "state.json", "__0_0.distcp")],
        *[("model", name) for name in ("config.json", "model.safetensors")],
        *[("sharded model", name) for name in ("model.safetensors.index.json", "model-1.safetensors")],
        ("pickled model", "pytorch_model.bin"),
        *[("run", name) for name in ("model.bin", "main.log", "metrics.jsonl", "config.json")],
    ],
)
def test_only_regular_files_in_the_folder_are_read(run, saved, model, tmp_path, place, file, plant):
    folder = tmp_path / ("step_2" if place == "checkpoint" else "folder")
    shutil.copytree({"checkpoint": saved, "run": run}.get(place, model), folder)
    if place == "sharded model":
        split(folder)
    elif place == "pickled model":
        into_bin(folder)
    readers: dict[str, Callable] = {"main.log": open_log, "metrics.jsonl": open_log, "model.bin": llmc.load_model}
    read: Callable
    if place == "run":
        read = readers.get(file, lambda folder: torchrun_id_of(folder / "config.json"))
    else:
        read = resume if place == "checkpoint" else from_pretrained
    read(folder)
    plant(folder / file)
    line = refusal(read, folder)
    assert file in line and ("no regular file" in line or "it is a link" in line)


def open_log(folder: Path) -> None:
    RunLog(folder).open(steps_done=9)


@pytest.mark.parametrize("read", [llmc.read_model, llmc.read_tokenizer, open_shard, load])
@pytest.mark.parametrize("name", ["a FIFO", "/dev/zero"])
def test_file_that_is_named_is_a_regular_one_behind_all_links(tmp_path, read, name):
    if name == "a FIFO":
        os.mkfifo(tmp_path / name)
    (tmp_path / "link.bin").symlink_to(tmp_path / name)
    assert "it is no regular file" in refusal(read, str(tmp_path / "link.bin"))


@contextlib.contextmanager
def changed_metadata(folder: Path):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    yield metadata
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def pickle_in_metadata(folder: Path, marker: Path) -> None:
    with changed_metadata(folder) as metadata:
        metadata.planner_data = Bomb(marker)


def pickle_behind_metadata(folder: Path, marker: Path) -> None:
    """DCP unpickles, without any limits, what its metadata calls bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    content = io.BytesIO()
    torch.save(Bomb(marker), content)
    with open(folder / "__0_0.distcp", "ab") as file:
        at = file.tell()
        file.write(content.getvalue())
    with changed_metadata(folder) as metadata:
        name, info = next(iter(metadata.state_dict_metadata)), next(iter(metadata.storage_data.values()))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(name)] = type(info)(info.relative_path, at, len(content.getvalue()))


def pickle_in_distcp(folder: Path, marker: Path) -> None:
    torch.save(Bomb(marker), folder / "__0_0.distcp")
    with changed_metadata(folder) as metadata:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size


def path_in_metadata(name: str):
    def plant(folder: Path, marker: Path) -> None:
        shutil.copy(folder / "__0_0.distcp", folder.parent / "outside.distcp")
        with changed_metadata(folder) as metadata:
            for info in metadata.storage_data.values():
                info.relative_path = str(folder.parent / "outside.distcp") if name == "absolute" else name

    return plant


def transform_in_metadata(folder: Path, marker: Path) -> None:
    with changed_metadata(folder) as metadata:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.zstd"]


def part_left_out_of_metadata(folder: Path, marker: Path) -> None:
    with changed_metadata(folder) as metadata:
        metadata.state_dict_metadata["model.transformer.wte.weight"].chunks.clear()


def huge_index_in_metadata(folder: Path, marker: Path) -> None:
    """pickle sets aside memory for two thousand million objects."""
    (folder / ".metadata").write_bytes(b"\x80\x02]r\x00\x00\x00\x70.")


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (pickle_in_metadata, "posix.system, which has no place in it"),
        (pickle_behind_metadata, "BytesStorageMetadata, which has no place in it"),
        (pickle_in_distcp, "posix.system, which has no place in it"),
        (path_in_metadata("../outside.distcp"), "is no file of tensors"),
        (path_in_metadata("absolute"), "is no file of tensors"),
        (transform_in_metadata, "is no file of tensors"),
        (part_left_out_of_metadata, "do not add up to it"),
        (huge_index_in_metadata, "leaves out indices"),
    ],
)
def test_crafted_checkpoint_runs_nothing(saved, tmp_path, capfd, plant, told):
    folder = tmp_path / "step_2"
    shutil.copytree(saved, folder)
    plant(folder, tmp_path / "marker")
    make_sums_fit(folder)
    capfd.readouterr()
    assert told in refusal(resume, folder)
    assert "Traceback" not in capfd.readouterr().err
    assert not (tmp_path / "marker").exists()


def test_sums_name_no_file_elsewhere(saved, tmp_path):
    folder = tmp_path / "step_2"
    shutil.copytree(saved, folder)
    (tmp_path / "outside").write_text("secret")
    with open(folder / "SHA256SUMS", "a") as file:
        file.write(f"{hashlib.sha256(b'secret').hexdigest()}  ../outside\n")
    assert "lines that are not sums" in refusal(resume, folder)


CODE = "import pathlib; pathlib.Path({marker!r}).touch()\n"


def foreign_code(folder: Path, marker: Path, model_type: str = "mine") -> None:
    remote = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"}
    configure(folder, model_type=model_type, auto_map=remote)
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))


def pickled(zipped: bool):
    def plant(folder: Path, marker: Path) -> None:
        torch.save({"wte.weight": Bomb(marker)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        (folder / "model.safetensors").unlink()

    return plant


def index_naming(name: str):
    def plant(folder: Path, marker: Path) -> None:
        split(folder)
        (folder / "model-1.safetensors").rename(folder.parent / "x.safetensors")
        path = folder / "model.safetensors.index.json"
        path.write_text(path.read_text().replace("model-1.safetensors", name))

    return plant


def storage_of_another_size(folder: Path, marker: Path) -> None:
    """torch.load believes the pickle, and reads beyond the end of what is in the file."""
    into_bin(folder)
    content = (folder / "pytorch_model.bin").read_bytes()
    at = content.index(b"cpuq") + 5  # the number of elements of the first storage, one byte
    assert content[at : at + 1] == b"K"
    (folder / "pytorch_model.bin").write_bytes(content[: at + 1] + b"\xff" + content[at + 2 :])


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (foreign_code, "model_type is mine, not gpt2"),
        (pickled(True), "posix.system, which has no place in it"),
        (pickled(False), "posix.system, which has no place in it"),
        (index_naming("../x.safetensors"), "weight_map"),
        (index_naming("/dev/zero"), "weight_map"),
        (storage_of_another_size, "cannot load this folder: pytorch_model.bin"),
    ],
)
def test_crafted_model_runs_nothing(copied, tmp_path, monkeypatch, plant, told):
    plant(copied, tmp_path / "marker")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    assert told in refusal(load, str(copied))
    assert sys.stdin.tell() == 0 and not (tmp_path / "marker").exists()


def test_names_of_code_in_a_configuration_of_ours_are_not_looked_at(copied, tmp_path, monkeypatch):
    foreign_code(copied, tmp_path / "marker", "gpt2")
    configure(copied, attn_implementation="kernels-community/flash-attn", _attn_implementation_internal="x/y")
    monkeypatch.setattr("socket.socket", None)  # nobody is asked
    assert load(str(copied)).config.n_embd == 4
    assert not (tmp_path / "marker").exists()


# More than their size justifies


@pytest.fixture
def memory_mib():
    """Most memory that was in use since this was asked for, over what was in use then, in MiB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"vocab_size": 30_000_000}, "of another shape: transformer.wte.weight"),
        ({"n_layer": 20_000}, "n_layer is 20000; it must be at most 1024"),
        ({"n_layer": 1000}, "missing: transformer.h.1."),
        ({"n_positions": 2**31}, "n_positions is 2147483648, and must be an integer"),
        ({"n_embd": True}, "n_embd is True"),
    ],
)
def test_configuration_of_a_network_that_is_not_there(copied, memory_mib, sizes, told):
    configure(copied, **sizes)
    assert told in refusal(load, str(copied))
    assert memory_mib() < 500


def test_tensors_that_share_few_bytes(copied):
    """30 million ids out of one row."""
    tensors = tensors_of(copied)
    tensors["transformer.wte.weight"] = torch.zeros(1, 4).expand(30_000_000, 4)
    torch.save(tensors, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    configure(copied, vocab_size=30_000_000)
    assert "is not in its storage" in refusal(load, str(copied))


def test_sparse_files_that_fit_their_headers(tmp_path, memory_mib):
    """6 TiB that take no room on the disk."""
    config = GPTConfig(block_size=8, vocab_size=2**27, n_layer=1, n_head=1, n_embd=2**13 - 2**9)
    sizes = (config.block_size, config.vocab_size, 1, 1, config.n_embd, config.vocab_size)
    header = np.zeros(256, "<i4")
    header[:8] = llmc.MODEL_MAGIC, 3, *sizes
    n_bytes = 4 * config.num_params() + 1024
    try:
        with open(tmp_path / "sparse.bin", "wb") as file:
            file.write(header.tobytes())
            file.truncate(n_bytes)
    except OSError:
        pytest.skip("no files of this size here")
    assert "GiB" in refusal(load, str(tmp_path / "sparse.bin"))
    header[:4] = llmc.TOKENIZER_MAGIC, 2, 2**30, 0
    with open(tmp_path / "sparse.bin", "r+b") as file:
        file.write(header.tobytes())
    assert "a tokenizer may have" in refusal(llmc.read_tokenizer, tmp_path / "sparse.bin")
    assert memory_mib() < 500


def test_layers_by_the_thousand_in_a_small_file(tmp_path):
    header = np.zeros(256, "<i4")
    header[:8] = llmc.MODEL_MAGIC, 3, 1, 1, 10_000, 1, 1, 128
    n_elements = 128 + 1 + 25 * 10_000 + 2
    (tmp_path / "deep.bin").write_bytes(header.tobytes() + bytes(4 * n_elements))
    assert "n_layer is 10000" in refusal(load, str(tmp_path / "deep.bin"))


def test_characters_that_control_a_terminal_are_written_as_escapes(copied):
    configure(copied, activation_function="\x1b[2J\x07")
    assert "\\x1b" in refusal(load, str(copied))
    tensors = tensors_of(copied) | {"transformer.\x1b]0;x\x07": torch.ones(1)}
    save_file(tensors, copied / "model.safetensors")
    configure(copied, activation_function="gelu_new")
    assert "\\x1b" in refusal(load, str(copied))


def test_model_in_the_hubs_cache_is_read_through_its_links(model, tmp_path, monkeypatch):
    """models--OWNER--NAME/snapshots/REVISION/FILE leads to ../../blobs/DIGEST."""
    import huggingface_hub.constants

    home = tmp_path / "models--some--model"
    snapshot, blobs = home / "snapshots" / ("0" * 40), home / "blobs"
    for folder in (snapshot, blobs, home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load("some/model").config == load(str(model)).config == load(str(snapshot)).config
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(model / "config.json")
    assert "it is a link" in refusal(load, "some/model")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_the_same_as_others(model, copied, zipped):
    into_bin(copied, zipped)
    expected = load(str(model)).state_dict()
    for name, tensor in load(str(copied)).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# Fuzz: a fixed seed, and the counts by reader


JUNK = [None, True, -1, 0, 1, 0.5, 1e308, 2**63, 10**400, "", "\x1b[2J", "x" * 3000, [], {}, [[]] * 9, {"": {}}, "../x"]
PIECES = [b"", b"\0" * 40, b"\xff", b"\n", b"[" * 5000, b'"', b"NaN", b"-", b"1e999", b"9" * 5000, b"}"]
PIECES += [b"s:1 trl:x\n", b"s:1 trl:1.000000\n", b'{"step": null}\n', b'{"step": "1"}\n', b'{"step": 1}\n']
HOWS = ["set", "delete", "rename", "copy"]


def some(*strategies):
    return st.lists(st.tuples(st.integers(0, 10**6), *strategies), min_size=1, max_size=3)


IN_JSON = some(st.sampled_from(HOWS), st.sampled_from(JUNK))
IN_BYTES = some(st.integers(0, 30), st.one_of(st.sampled_from(PIECES), st.binary(max_size=8)))


def change_json(content: bytes, changes) -> bytes:
    """Set, delete and rename fields, or put another part of the document in their place."""
    document = json.loads(content)
    for at, how, junk in changes:
        spots = spots_in(document)
        if not spots:
            continue
        owner, key = spots[at % len(spots)]
        if how == "set":
            owner[key] = junk
        elif how == "delete":
            del owner[key]
        elif how == "rename" and isinstance(owner, dict):
            owner[f"{key}x"] = owner.pop(key)
        else:
            owner[key] = json.loads(json.dumps(spots[at // 7 % len(spots)][0]))
        document = json.loads(json.dumps(document))  # or what was put into two places is one object
    return json.dumps(document).encode()


def spots_in(value) -> list:
    """Every (object or list, key or index) in a document; of a list, the first five."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 5))
    return [spot for key in keys for spot in ((value, key), *spots_in(value[key]))]


def change_header(content: bytes, changes) -> bytes:
    """Change the JSON at the beginning of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = change_json(content[8:end], changes)
    return len(header).to_bytes(8, "little") + header + content[end:]


def change_bytes(content: bytes, changes) -> bytes:
    for at, n_deleted, piece in changes:
        at %= len(content) + 1
        content = content[:at] + piece + content[at + n_deleted :]
    return content


def step_from_state(folder: Path) -> None:
    """Read state.json, and do a step from there."""
    state, saved = new_state(), read_state(folder)
    loader = ShardLoader(str(folder / "train_*"), 4, 16, vocab_size=TINY.vocab_size)
    with generators_kept():
        try:
            state.load_state_dict(saved)
        except ValueError as error:  # of which Checkpoints.load makes a line
            raise BadInput(str(error)) from error
        loader.load_state_dict(saved["loader"])
        loader.next_batch()
        state.guard.reason_to_skip("", 3.0, 3.0)
        state.scaler.scale(torch.ones(()))


def read_logs(folder: Path) -> None:
    shutil.copy(folder / "metrics.jsonl", folder / "main.log")
    open_log(folder)
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        assert type(json.loads(line)["step"]) is int
    RunLog(folder).open(9).draw()


def read_run_config(folder: Path) -> None:
    torchrun_id_of(folder / "config.json")


def with_scale(folder: Path) -> None:
    """As a run in float16 writes it."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    record = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(record | {"scaler": scaler.state_dict()}))


def into_bin_in_a_row(folder: Path) -> None:
    into_bin(folder, zipped=False)


def nothing(folder: Path) -> None:
    pass


# By reader: the folder that is copied, the file in it, how it is changed, what is done to the folder before, who reads.
READERS: dict[str, tuple] = {
    "state.json": ("saved", "state.json", change_json, with_scale, step_from_state),
    "state.json, bytes": ("saved", "state.json", change_bytes, with_scale, step_from_state),
    "SHA256SUMS": ("saved", "SHA256SUMS", change_bytes, nothing, resume),
    ".metadata": ("saved", ".metadata", change_bytes, nothing, resume),
    ".distcp": ("saved", "__0_0.distcp", change_bytes, nothing, resume),
    "config.json of a run": ("run", "config.json", change_json, nothing, read_run_config),
    "logs": ("run", "metrics.jsonl", change_bytes, nothing, read_logs),
    "model.bin": ("run", "model.bin", change_bytes, nothing, llmc.load_model),
    "config.json of a model": ("model", "config.json", change_json, nothing, from_pretrained),
    "config.json of a model, bytes": ("model", "config.json", change_bytes, nothing, from_pretrained),
    "index": ("model", "model.safetensors.index.json", change_json, split, from_pretrained),
    "safetensors, header": ("model", "model.safetensors", change_header, nothing, from_pretrained),
    "safetensors, bytes": ("model", "model.safetensors", change_bytes, nothing, from_pretrained),
    "pytorch_model.bin": ("model", "pytorch_model.bin", change_bytes, into_bin, from_pretrained),
    "pytorch_model.bin in a row": ("model", "pytorch_model.bin", change_bytes, into_bin_in_a_row, from_pretrained),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("examples", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_fuzz(reader, examples, run, saved, model, tiny, tmp_path, memory_mib, capfd):
    """Change a file again and again, and read it."""
    source, file, change, prepare, read = READERS[reader]
    folder = tmp_path / f"step_{STEP}"
    shutil.copytree({"run": run, "saved": saved, "model": model}[source], folder)
    prepare(folder)
    for shard in Path(tiny["--input_bin"]).parent.glob("train_*"):
        (folder / shard.name).symlink_to(shard)
    content = (folder / file).read_bytes()
    counts, largest = {"read": 0, "refused": 0}, len(content)

    def attempt(changed):
        nonlocal largest
        largest = max(largest, len(changed))
        (folder / file).write_bytes(changed)
        if source == "saved" and file != "SHA256SUMS":
            make_sums_fit(folder)
        signal.alarm(HANG_S)
        try:
            read(folder)
            counts["read"] += 1
        except BadInput as error:
            line = " ".join(str(error).split())
            assert line.isprintable() and len(line) < 2000
            counts["refused"] += 1

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck]
    )
    @given(IN_BYTES if change is change_bytes else IN_JSON)
    def check(changes):
        attempt(change(content, changes))

    read(folder)  # it is the changes that are refused
    attempt(content[: len(content) // 2])  # whichever changes a version of hypothesis draws, this one is in them
    check()
    with capfd.disabled():
        print(f"\n{reader}: {counts['read']} read, {counts['refused']} refused", end=" ")
    assert sum(counts.values()) >= examples // 2
    assert counts["refused"] or reader == "logs"  # there a line that is none is left out
    assert memory_mib() < 3 * largest / 2**20 + 500
