"""Fixtures that more than one folder of tests uses."""

import itertools
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data.shards import write_shard
from kernels.ops import EAGER, triton_ops
from model.gpt import GPT, GPTConfig
from model.llmc import write_model
from tests.training import ranks
from training.log import RunLog

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = triton_ops(DEVICE)  # before any test imports triton, by itself or through torch.compile

import triton  # noqa: E402

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="needs Triton's interpreter, and the kernels of this process are compiled for a GPU",
)

TINY = GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=32)


# On tiny tensors, threads wait for each other more than they compute; and other tests run beside this one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, and child processes inherit that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)  # and so is this one in a shell's background


def pytest_xdist_auto_num_workers(config) -> int:
    """Four processes for the whole suite on a CPU: its tests wait, too. None beside this one for a few tests, whose
    output may be wanted, or on a GPU, whose memory some tests fill."""
    whole = config.args_source.name == "TESTPATHS"
    return 4 if whole and not torch.cuda.is_available() else 0


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none; pytest's closing line counts them."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def pytest_configure(config):
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@dataclass
class Run:
    """What a run of train.py left."""

    output_dir: Path
    screen: str

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.output_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]

    @property
    def log(self) -> list[str]:
        return (self.output_dir / "main.log").read_text().splitlines()


@pytest.fixture(autouse=True)
def _keep_process_state():
    """train.main listens to Ctrl-C and may set the matmul precision; both belong to the process."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _blank_pictures(monkeypatch):
    monkeypatch.setattr(RunLog, "_figure", ranks.blank_figure)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, str]:
    """A tiny network and shards that it can learn from: the flags that name them."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "gpt2_tiny.bin", GPT(TINY, EAGER))
    rng = np.random.default_rng(7)
    # A random walk over the vocabulary: the next token is near the last one, which a bigram model can find out.
    for name, n_tokens in {"train_0": 2003, "train_1": 1501, "val_0": 1009}.items():
        walk = np.cumsum(rng.integers(-2, 3, n_tokens)) % TINY.vocab_size
        write_shard(folder / f"{name}.bin", walk.astype(np.uint16))
    return {
        "--model": str(folder / "gpt2_tiny.bin"),
        "--input_bin": str(folder / "train_*.bin"),
        "--input_val_bin": str(folder / "val_*.bin"),
        "--device": "cpu",
        "--batch_size": "4",
        "--sequence_length": "16",
        "--total_batch_size": "128",
        "--num_iterations": "5",
        "--learning_rate": "3e-3",
        "--val_loss_every": "0",
    }


@pytest.fixture
def sdpa_calls(monkeypatch) -> list[torch.device]:
    """On which device torch's scaled_dot_product_attention was called: an entry for each call."""
    attention, devices = F.scaled_dot_product_attention, []

    def noted(query, *args, **kwargs):
        devices.append(query.device)
        return attention(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return devices


def command_line(flags: dict) -> list[str]:
    """{"--flag": value} as arguments."""
    return [str(word) for pair in flags.items() for word in pair]


@pytest.fixture
def run_tiny(tiny, tmp_path, capsys):
    """Run train.py on the tiny network in this process, with more flags or others."""
    numbers = itertools.count()

    def run(expect_status: int = 0, **flags) -> Run:
        output_dir = tmp_path / f"run{next(numbers)}"
        given = {f"--{name}": value for name, value in flags.items()}
        status = train.main(command_line(tiny | {"--output_dir": output_dir} | given))
        assert status == expect_status
        return Run(Path(given.get("--output_dir", output_dir)), capsys.readouterr().out)

    return run
