"""Bad input: exit status 2, one line that names the flag or the file and says what to do, nothing written."""

import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton

import train
from common import BadInput
from kernels import ops
from kernels.ops import EAGER
from model.gpt import GPT
from model.llmc import write_model
from tests.conftest import DEVICE, ROOT, TINY, command_line
from training import distributed


def shard_bytes(tokens, magic=20240520) -> bytes:
    return struct.pack("<256i", magic, 1, len(tokens), *[0] * 253) + np.asarray(tokens).astype("<u2").tobytes()


@pytest.fixture
def refused(tiny, tmp_path, capfd):
    """Run with the tiny flags and others; check how it is refused; return the line on standard error."""

    def run(flags: dict) -> str:
        before = sorted(tmp_path.rglob("*"))
        output = {"--output_dir": str(tmp_path / "run")}
        with pytest.raises(SystemExit) as stopped:
            train.main(command_line(tiny | output | flags))
        assert stopped.value.code == 2
        errors = capfd.readouterr().err.strip()
        assert errors.startswith("train.py: ") and "\n" not in errors and "Traceback" not in errors
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return errors

    return run


@pytest.mark.parametrize("which", ["--input_bin", "--input_val_bin"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (shard_bytes([0] * 500, magic=7), ["magic", "7", "20240520"]),
        (shard_bytes([0] * 60), ["60", "65"]),  # 4 × 16 + 1 are needed
        (shard_bytes([0] * 300 + [TINY.vocab_size] + [0] * 99), ["300", "61"]),
    ],
    ids=["magic", "too-small", "token-id"],
)
def test_shards(refused, tmp_path, which, content, told):
    path = tmp_path / "bad_shard.bin"
    path.write_bytes(content)
    line = refused({which: path, "--val_loss_every": 1})
    for word in [str(path), *told]:
        assert word in line, line


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"--input_bin": "nothing_*.bin"}, ["nothing_*.bin"]),
        ({"--total_batch_size": 100}, ["the nearest that is: 64 or 128"]),
        ({"--sequence_length": 64, "--total_batch_size": 256}, ["--sequence_length 64", "block_size 32"]),
        ({"--model": "gpt2_none.bin"}, ["--model gpt2_none.bin: cannot be read"]),
        ({"--model": "."}, ["--model .: cannot load this folder"]),
        ({"--model": "gpt5"}, ["--model gpt5", "d12"]),
        ({"--model": "runs/not_there"}, ["--model runs/not_there"]),
        ({"--model": "./not_there"}, ["--model ./not_there"]),
        ({"--dtype": "float64"}, ["--dtype", "float32"]),
        ({"--resume": "nowhere"}, ["--resume nowhere: no checkpoint there"]),
        ({"--device": "tpu"}, ["--device tpu", "cuda"]),
        ({"--zero_stage": 1}, ["--zero_stage 1", "torchrun"]),
        ({"--cuda_graph": 1}, ["--cuda_graph 1 needs an NVIDIA GPU", "give --cuda_graph 0"]),
        ({"--sample_every": 1}, ["--sample_every", "61"]),
        ({"--val_loss_every": 1, "--input_val_bin": ""}, ["--val_loss_every", "--input_val_bin"]),
        ({"--backend": "triton,"}, ["--backend triton,:", "unknown"]),
        ({"--backend": "triton,gelu=nobody"}, ["--backend triton,gelu=nobody:", "unknown backend 'nobody'"]),
    ],
)
def test_flags(refused, flags, told):
    line = refused(flags)
    for word in told:
        assert word in line, line


@pytest.mark.parametrize("backend", ["triton", "eager,attention=triton"])
def test_flash_where_attention_is_a_kernel(refused, backend):
    line = refused({"--device": DEVICE, "--flash": 1, "--backend": backend})
    for word in ("--flash 1", f"--backend {backend} ", "--backend sdpa or --backend triton,attention=sdpa"):
        assert word in line, line


def test_kernels_on_a_cpu_in_a_process_that_compiles(refused, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    ops.triton_ops.cache_clear()
    line = refused({"--device": "cpu", "--backend": "triton"})
    assert "--backend triton: in this process" in line and "use cpu in a process of its own" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(refused):
    assert "--device cuda: there is none here" in refused({"--device": "cuda"})


def test_model_file_cut_short(refused, tmp_path):
    path = tmp_path / "gpt2_short.bin"
    write_model(path, GPT(TINY, EAGER))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    line = refused({"--model": path})
    assert str(path) in line and str(len(whole)) in line.replace(",", "")


def test_hub_that_cannot_be_reached(refused, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refused({"--model": "gpt2", "--sequence_length": 16})
    assert "gpt2" in line and "d12" in line


def test_output_dir_is_a_file(refused, tmp_path):
    path = tmp_path / "a_file"
    path.write_text("mine")
    assert f"--output_dir {path} is a file" in refused({"--output_dir": path})
    assert path.read_text() == "mine"


def test_output_dir_with_something_in_it(refused, tmp_path):
    path = tmp_path / "notes"
    path.mkdir()
    (path / "main.log").write_text("mine")
    assert f"--output_dir {path} is not empty" in refused({"--output_dir": path})
    assert (path / "main.log").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_read_only_disk(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))  # /proc has no room
    assert "cannot write --output_dir /proc/run: " in refused({"--output_dir": "/proc/run"})


@pytest.mark.parametrize("flag", ["--output_dir", "--model", "--input_bin", "--resume"])
@pytest.mark.parametrize("suffix", ["", ".bin"])
def test_name_that_the_disk_does_not_take(refused, flag, suffix):
    """What the operating system says to 300 characters stands for all that it may say to a look at a path."""
    name = 300 * "x" + suffix
    assert name in refused({flag: name})


def test_disk_without_room_for_the_weights(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    line = refused({})
    assert "the disk has 0 MiB left" in line


def test_disk_that_fills_up_while_the_weights_are_written(tiny, tmp_path, capfd):
    """A limit on the size of files stands in for the full disk: write(2) fails in the same way, half-way through."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        with pytest.raises(SystemExit) as stopped:
            train.main(command_line(tiny | {"--output_dir": tmp_path / "run", "--num_iterations": 1}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.startswith(f"train.py: cannot write {tmp_path / 'run' / 'model.bin'}: ")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.bin" not in left and not any(name.endswith(".part") for name in left)
    assert {"main.log", "metrics.jsonl", "config.json"} <= left


RANK_0 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "2"}, "without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        *[(RANK_0 | {"WORLD_SIZE": text}, "WORLD_SIZE") for text in ("two", "٢")],
        *[(RANK_0 | {"RANK": text}, "RANK") for text in ("", "2")],
        (RANK_0 | {"LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        (RANK_0 | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (RANK_0 | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
        (RANK_0 | {"TORCHELASTIC_RESTART_COUNT": "9" * 400}, "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_environment_of_no_rank(monkeypatch, environment, told):
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(BadInput, match=f"{told}.*torchrun"):
        distributed.start("cpu", timeout_s=1)


def test_compiler_that_is_not_there(refused, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch, "compile", fail)
    line = refused({"--compile": 1})
    assert "--compile 1: a trial failed: InvalidCxxCompiler: No working C++ compiler found; it needs" in line


def test_no_folder_for_temporary_files(tiny, tmp_path):
    """And an empty WORLD_SIZE, which is as good as none."""
    done = subprocess.run(
        [sys.executable, "train.py", *command_line(tiny | {"--output_dir": tmp_path / "run"})],
        cwd=ROOT,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "a_file" / "below"), "WORLD_SIZE": ""},
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=(tmp_path / "a_file").touch,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: torch has no folder for temporary files (Not a directory); name one")
    assert not (tmp_path / "run").exists()
