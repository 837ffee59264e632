"""The main job on a GPU: the same losses as on the CPU, in every precision, through the prefetching loader and NCCL."""

import os
import subprocess
import sys

import pytest
import torch

from data.loader import ShardLoader
from tests.conftest import ROOT, TINY, Run, command_line
from training.distributed import start
from training.faults import UpdateGuard

pytestmark = pytest.mark.gpu


def test_prefetched_batches_are_those_of_the_cpu(tiny):
    on_cpu = ShardLoader(tiny["--input_bin"], 4, 16)
    on_gpu = ShardLoader(tiny["--input_bin"], 4, 16, device=torch.device("cuda"))
    for step in range(120):  # several times round the shards
        if step == 50:
            on_gpu.load_state_dict(on_cpu.state_dict())
        if step == 80:
            on_cpu.reset()
            on_gpu.reset()
        for ours, theirs in zip(on_gpu.next_batch(), on_cpu.next_batch(), strict=True):
            assert ours.is_cuda and torch.equal(ours.cpu(), theirs)


def test_float32_has_the_losses_of_the_cpu(run_tiny):
    want = run_tiny(num_iterations=10, val_loss_every=5)
    got = run_tiny(num_iterations=10, val_loss_every=5, device="cuda", dtype="float32")
    assert got.losses == pytest.approx(want.losses, rel=1e-4)
    assert [line["norm"] for line in got.metrics] == pytest.approx([line["norm"] for line in want.metrics], rel=1e-3)


def test_two_runs_are_the_same_bits_on_a_gpu(run_tiny):
    assert run_tiny(device="cuda").losses == run_tiny(device="cuda").losses


@pytest.mark.parametrize(
    "flags",
    [{"tensorcores": 1}, {"dtype": "bfloat16"}, {"dtype": "float16"}],
    ids=lambda flags: "-".join(f"{name}{value}" for name, value in flags.items()),
)
def test_low_precision_is_close_on_a_gpu(run_tiny, flags):
    want = run_tiny(num_iterations=10)
    assert run_tiny(num_iterations=10, device="cuda", **flags).losses == pytest.approx(want.losses, rel=2e-2)


@pytest.mark.parametrize("backend", ["eager", "triton,attention=eager"])
def test_flash_on_a_gpu(run_tiny, sdpa_calls, backend):
    want = run_tiny(num_iterations=10)
    assert not sdpa_calls
    got = run_tiny(num_iterations=10, device="cuda", dtype="bfloat16", flash=1, backend=backend)
    assert len(sdpa_calls) == 10 * 2 * TINY.n_layer and all(device.type == "cuda" for device in sdpa_calls)
    assert got.losses == pytest.approx(want.losses, rel=2e-2)


def test_compile_on_a_gpu(run_tiny):
    want = run_tiny(device="cuda", val_loss_every=2)
    assert run_tiny(device="cuda", val_loss_every=2, compile=1).losses == pytest.approx(want.losses, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [0, 1])
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_cuda_graphs_have_the_bits_of_a_run_without(run_tiny, backend, compile, dtype):
    """Three updates of warm-up, the captures, then replays with other batches and learning rates, and with validation
    and checkpoints in between."""
    flags = {"device": "cuda", "backend": backend, "compile": compile, "dtype": dtype, "num_iterations": 12}
    flags |= {"val_loss_every": 4, "warmup_iters": 6, "weight_decay": 0.1, "checkpoint_every": 5, "keep": 9}

    def run(**more):
        torch.compiler.reset()  # it compiles the forward pass only so many times in a process
        return run_tiny(**flags, **more)

    plain, graphed = run(), run(cuda_graph=1)
    assert graphed.losses == plain.losses and graphed.log == plain.log
    assert (graphed.output_dir / "model.bin").read_bytes() == (plain.output_dir / "model.bin").read_bytes()
    assert run(cuda_graph=1, resume=plain.output_dir / "checkpoints" / "step_5").losses == plain.losses[5:]


def test_cuda_graphs_skip_what_a_run_without_skips(run_tiny, monkeypatch):
    """An update that the host refuses after its gradients were replayed, and one of the warm-up."""
    reason_to_skip, asked = UpdateGuard.reason_to_skip, []

    def refuse_some(self, where, loss, norm):
        asked.append(where)
        return f"{where}: refused" if len(asked) in (2, 7) else reason_to_skip(self, where, loss, norm)

    monkeypatch.setattr(UpdateGuard, "reason_to_skip", refuse_some)
    losses = []
    for on in (0, 1):
        asked.clear()
        losses.append(run_tiny(device="cuda", num_iterations=10, cuda_graph=on).losses)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resumed_run_is_the_same_bits_on_a_gpu(run_tiny, dtype):
    """Through pinned buffers, and with the state of CUDA's generator and of the loss scale."""
    flags = {"device": "cuda", "dtype": dtype, "num_iterations": 8, "shuffle": 1}
    whole = run_tiny(**flags, checkpoint_every=2, keep=9)
    again = run_tiny(**flags, resume=whole.output_dir / "checkpoints" / "step_4")
    assert again.losses == whole.losses[4:]
    assert (again.output_dir / "model.bin").read_bytes() == (whole.output_dir / "model.bin").read_bytes()


def torchrun(ranks: int, flags: dict) -> Run:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *command_line(flags)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Run(flags["--output_dir"], done.stdout)


@pytest.mark.parametrize("zero_stage", range(4))
def test_nccl(run_tiny, tiny, tmp_path, zero_stage):
    ranks = torch.cuda.device_count() if torch.cuda.device_count() in (2, 4) else 1
    one = run_tiny(total_batch_size=256, device="cuda", batch_size=4 * ranks)
    flags = tiny | {"--total_batch_size": 256, "--device": "cuda", "--zero_stage": zero_stage}
    whole = torchrun(ranks, flags | {"--output_dir": tmp_path / "whole", "--checkpoint_every": 2, "--keep": 9})
    assert whole.losses == pytest.approx(one.losses, rel=1e-4)
    resume = {"--output_dir": tmp_path / "again", "--resume": whole.output_dir / "checkpoints" / "step_2"}
    again = torchrun(ranks, flags | resume)
    assert again.losses == whole.losses[2:]


def test_the_device_is_a_type_with_an_index():
    assert start("cuda").device == torch.device("cuda", 0)
