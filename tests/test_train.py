"""The main job, end to end: the loop against one written here in plain PyTorch, and everything that a run leaves."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data.shards import open_shard
from model import llmc
from model.gpt import PRESETS
from tests.conftest import ROOT, TINY, command_line
from training import run_dir
from training.config import Config, parse
from training.distributed import StopRequest, World
from training.log import RunLog


def tokens_of(pattern: str) -> list[torch.Tensor]:
    paths = sorted(Path(pattern).parent.glob(Path(pattern).name))
    return [torch.from_numpy(np.asarray(open_shard(path)).astype(np.int64)) for path in paths]


def windows(shards: list[torch.Tensor], B: int, T: int):
    """Inputs and targets of one process, forever: in each shard, as many whole batches as fit, with the last target."""
    while True:
        for shard in shards:
            for base in range(0, len(shard) - B * T, B * T):
                window = shard[base : base + B * T + 1]
                yield window[:-1].view(B, T), window[1:].view(B, T)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loop_gives_the_bits_of_a_plain_one(tiny, run_tiny):
    run = run_tiny(num_iterations=12, warmup_iters=3, learning_rate_decay_frac=0.1, weight_decay=0.1, grad_clip=0.7)

    gpt = llmc.load_model(Path(tiny["--model"]))
    batches = windows(tokens_of(tiny["--input_bin"]), B=4, T=16)
    params = list(gpt.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step, got in enumerate(run.metrics):
        loss = 0.0
        for _ in range(2):  # 128 tokens an update are two micro-batches of 4 × 16
            x, y = next(batches)
            logits = gpt(x, y)[0]
            micro_loss = F.cross_entropy(logits.view(-1, TINY.vocab_size), y.reshape(-1)) / 2
            micro_loss.backward()
            loss += micro_loss.item()
        lr = 3e-3 * (step + 1) / 3 if step < 3 else 3e-4 + 0.5 * 2.7e-3 * (1 + math.cos(math.pi * (step - 3) / 9))
        norm = torch.stack([p.grad.norm() for p in params]).norm().item()
        for p in params:
            p.grad *= min(1.0, 0.7 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert got["step"] == step + 1 and got["tokens"] == 128 * (step + 1)
        assert got["loss"] == pytest.approx(loss, rel=1e-6)
        assert got["norm"] == pytest.approx(norm, rel=1e-5)
        assert got["lr"] == pytest.approx(lr, rel=1e-12)
    trained = llmc.load_model(run.output_dir)
    assert run.losses[-1] < run.losses[0] - 0.1
    assert any(line["norm"] > 0.7 for line in run.metrics)  # the clip had something to do
    for name, weight in gpt.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weight, rtol=2e-4, atol=2e-6)


def test_run_directory_and_logs(run_tiny, tiny):
    run = run_tiny(val_loss_every=2, val_max_steps=3)
    names = {path.name for path in run.output_dir.iterdir()}
    assert names == {"main.log", "metrics.jsonl", "loss.png", "config.json", "model.bin"}
    kinds = [re.fullmatch(r"s:(\d+) (tel|trl):\d+\.\d{6}", line).groups() for line in run.log]
    tel, trl = "tel", "trl"
    order = [(0, tel), (0, trl), (1, trl), (2, tel), (2, trl), (3, trl), (4, tel), (4, trl), (5, tel)]
    assert kinds == [(str(step), kind) for step, kind in order]
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5]
    assert all(line["mfu"] is None for line in run.metrics)  # nobody knows the peak of a CPU
    config = json.loads((run.output_dir / "config.json").read_text())
    assert config["flags"]["val_loss_every"] == 2 and config["flags"]["model"] == tiny["--model"]
    assert config["network"]["n_embd"] == TINY.n_embd
    assert str(run.output_dir) in run.screen and "python -m model.hf export" in run.screen
    assert re.search(r"10 tensors \([\d,]+ parameters\) decay", run.screen)
    assert "mean of the last 4 steps" in run.screen
    for line in run.metrics:
        assert f"step {line['step']}/5 | train loss {line['loss']:.6f} | norm {line['norm']:.4f}" in run.screen


def test_validation_is_the_mean_of_the_first_batches_each_time(tiny, run_tiny):
    run = run_tiny(val_loss_every=5, val_max_steps=3, learning_rate=0)
    gpt = llmc.load_model(Path(tiny["--model"]))
    batches = windows(tokens_of(tiny["--input_val_bin"]), B=4, T=16)
    with torch.no_grad():
        want = sum(gpt(*next(batches))[1].item() for _ in range(3)) / 3
    got = [float(line.split("tel:")[1]) for line in run.log if "tel" in line]
    assert got == pytest.approx([want, want], abs=1e-5)


def test_a_run_directory_can_be_trained_from(run_tiny):
    first = run_tiny(num_iterations=30)
    second = run_tiny(model=first.output_dir)
    assert second.losses[0] < first.losses[0] - 0.3
    idle = run_tiny(model=first.output_dir, learning_rate=0)
    assert same_state(llmc.load_model(first.output_dir), llmc.load_model(idle.output_dir))


def test_overfitting_a_single_batch(run_tiny):
    run = run_tiny(overfit_single_batch=1, num_iterations=60, total_batch_size=64, learning_rate=1e-2)
    assert run.losses[-1] < 0.5 < 3.5 < run.losses[0]


def test_sdpa_trains_like_the_explicit_attention(run_tiny, sdpa_calls):
    explicit = run_tiny(flash=0).losses
    assert not sdpa_calls
    sdpa = run_tiny(backend="sdpa").losses
    assert sdpa == pytest.approx(explicit, rel=1e-5)
    assert len(sdpa_calls) == 5 * 2 * TINY.n_layer  # 5 steps of 2 micro-batches
    for flags in ({}, {"backend": "eager"}, {"backend": "sdpa"}):
        assert run_tiny(flash=1, **flags).losses == sdpa
    assert len(sdpa_calls) == 4 * 5 * 2 * TINY.n_layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_close_and_trains(run_tiny, dtype):
    reference = run_tiny(num_iterations=12)
    run = run_tiny(num_iterations=12, dtype=dtype)
    assert run.losses[0] != reference.losses[0]  # autocast was on
    assert run.losses == pytest.approx(reference.losses, rel=2e-2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_residual_stream_in_16_bits_is_close_and_trains(run_tiny, backend):
    wide, narrow = (
        run_tiny(num_iterations=6, dtype="bfloat16", residual_dtype=dtype, backend=backend)
        for dtype in ("float32", "bfloat16")
    )
    assert narrow.losses[0] != wide.losses[0]  # it was rounded
    assert narrow.losses == pytest.approx(wide.losses, rel=2e-2)


def test_compile_gives_the_losses_of_eager(run_tiny, monkeypatch):
    compile = torch.compile
    asked = []

    def without_code_generation(model, **options):
        asked.append(options)
        return compile(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", without_code_generation)
    flags = {"num_iterations": 2, "val_loss_every": 2, "val_max_steps": 1}
    got = run_tiny(compile=1, **flags)
    assert asked == [{"fullgraph": True}] * 2  # a trial, and the network
    assert got.log == run_tiny(**flags).log


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compile_with_inductor(run_tiny):
    assert run_tiny(compile=1, val_loss_every=2).losses == pytest.approx(run_tiny().losses, rel=1e-5)


def test_inference_only_measures_forward_passes(run_tiny):
    run = run_tiny(inference_only=1)
    assert run.losses[0] == run_tiny(num_iterations=1).losses[0]
    assert all(line["norm"] is None for line in run.metrics)
    assert not (run.output_dir / "model.bin").exists()
    assert "| norm" not in run.screen


def test_nothing_is_written_without_an_output_dir(run_tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_tiny(output_dir="")
    assert list(tmp_path.iterdir()) == []


def test_writing_tensors_leaves_the_run_unchanged(run_tiny, tiny):
    plain = run_tiny()
    run = run_tiny(write_tensors=1)
    assert run.losses == plain.losses
    assert same_state(llmc.load_model(run.output_dir), llmc.load_model(plain.output_dir))
    # What the run started from; tests/test_formats.py reads the other files.
    assert same_state(llmc.load_model(run.output_dir / "gpt2_tiny.bin"), llmc.load_model(Path(tiny["--model"])))
    assert not (run.output_dir / "gpt2_tokenizer.bin").exists()  # 61 tokens are not GPT-2's


def test_without_any_flag_but_the_number_of_steps(tmp_path, monkeypatch, capsys):
    """The embedded corpus, nano, validation and samples; the run goes into a new folder under runs/."""
    monkeypatch.chdir(tmp_path)
    flags = {"--device": "cpu", "--num_iterations": 2, "--val_max_steps": 1, "--write_tensors": 1}
    assert train.main(command_line(flags)) == 0
    (output_dir,) = (tmp_path / "runs").iterdir()
    assert output_dir.name.endswith("-nano") or output_dir.name.endswith("_nano")
    screen = capsys.readouterr().out
    assert "7,259,008 parameters" in screen
    losses = [float(line.split("l:")[1]) for line in (output_dir / "main.log").read_text().splitlines()]
    assert len(losses) == 4 and all(10 < loss < 11.2 for loss in losses)
    first, last = screen.split("sample: ")[1:]
    text = last.partition("\nmean of")[0]
    assert first[0] in "'\"" and text[0] not in "'\"" and len(text) > 2 * len(first.splitlines()[0])
    assert re.findall(r"\| (\S+) left$", screen, re.MULTILINE)[-1] == "0:00:00"
    expected = {f"gpt2_nano{kind}.bin" for kind in ("", "_bf16", "_debug_state")} | {"gpt2_tokenizer.bin", "model.bin"}
    assert {path.name for path in output_dir.glob("*.bin")} == expected


def test_folder_that_is_taken_away_under_a_run(tiny, tmp_path, monkeypatch, capsys):
    line = RunLog.train

    def take_away(self, metrics):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        line(self, metrics)

    monkeypatch.setattr(RunLog, "train", take_away)
    with pytest.raises(SystemExit) as stopped:
        train.main(command_line(tiny | {"--output_dir": tmp_path / "run", "--inference_only": 1}))
    assert stopped.value.code == 2
    assert f"cannot write {tmp_path / 'run'}: No such file or directory" in capsys.readouterr().err


def test_runs_of_one_second_get_folders_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda format: "now")
    for _ in range(2):
        train.main(command_line(tiny | {"--num_iterations": 1}))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["now_tiny", "now_tiny-2"]


def test_largest_numbers_that_are_taken_end_in_a_line_if_at_all(run_tiny):
    names = ("learning_rate", "learning_rate_decay_frac", "weight_decay", "grad_clip", "skip_loss_z", "skip_norm_z")
    run = run_tiny(num_iterations=3, checkpoint_every=sys.maxsize, **dict.fromkeys(names, 1e12))
    assert len(run.metrics) == 3


HOSTILE = "-a $(touch made) `touch made`; touch made # 'q' \"d\" [b] * \\\n line & x"


def test_lines_to_paste_survive_a_shell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in (HOSTILE, "nano", "runs/one"):
        Path(name, "checkpoints", "step_3").mkdir(parents=True)
        config = Config(model=f"./{name}", input_bin=f"{name}/train_*.bin", num_iterations=7)
        run_dir.summarize(Path(name), config, cast(World, SimpleNamespace(distributed=False)), finished=False)
        screen = capsys.readouterr().out
        labels = ("resume: ", "train from these weights: ", "export to transformers: ")
        lines = re.fullmatch(r".*\n" + r"\n".join(rf"{label} *(.*)" for label in labels) + r"\n", screen, re.DOTALL)
        arguments = []
        for line in lines.groups():
            script = f"python() {{ printf '%s\\0' \"$@\"; }}\n{line}"
            words = subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout
            arguments.append(words.split("\0")[:-1])
        resume, model, export = arguments
        assert parse(resume[1:]) == dataclasses.replace(config, output_dir=name, resume="auto")
        named = parse(model[1:]).model
        assert Path(named) == Path(name) and named not in PRESETS
        assert export[:3] == ["-m", "model.hf", "export"] and Path(export[3]) == Path(name)
        assert not export[3].startswith("-") and len(export) == 5
    assert not Path("made").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_is_heeded_unless_nohup_ignores_it(ignored):
    heeded = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in heeded}
    try:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopRequest().install()
        signal.raise_signal(signal.SIGHUP)
        assert stop.preempted is not ignored
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_in_a_process_of_its_own_whose_screen_takes_little_and_is_closed(tiny, tmp_path):
    """No stdin, a stdout that is not UTF-8 and is closed after a line, no stderr: the run is the same. And kernels are
    interpreted: torch's compiler imports triton too, which must not happen before the backend is chosen."""
    run = {"--output_dir": tmp_path / "run", "--backend": "triton", "--num_iterations": 2, "--total_batch_size": 64}
    flags = command_line(tiny | run | {"--val_loss_every": 2, "--val_max_steps": 1})
    unprepared = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = '"$@" <&- 2>&- | head -n 1; exit "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "train.py", *flags],
        cwd=ROOT,
        env=unprepared | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model ") and done.stdout.count("\n") == 1
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"main.log", "metrics.jsonl", "loss.png", "config.json", "model.bin"}
