"""Every ZeRO stage on 1, 2 and 4 gloo ranks against one process on the same global batch."""

import filecmp
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from data.tokenizer import vocabulary_files
from model import hf
from model.gpt import GPT, GPTConfig
from model.llmc import write_model
from tests.conftest import TINY
from tests.training.conftest import assert_close, assert_weights_agree, keep_gradients, same_weights, weights_of
from tests.training.zero import unreduced
from training import distributed

STRIDE = 8  # sequences that all ranks read in a micro-step
FLAGS = {
    "num_iterations": 8,
    "total_batch_size": 2 * STRIDE * 16,  # two micro-steps of 16 tokens a sequence
    "weight_decay": 0.1,
    "grad_clip": 0.7,
    "warmup_iters": 3,
    "learning_rate_decay_frac": 0.1,
    "val_loss_every": 4,
    "val_max_steps": 3,
}


@pytest.fixture(scope="module")
def reference():
    """Filled by the first test that needs it."""
    return {}


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 3), (2, 0), (2, 2), (4, 1), (4, 3)])
def test_ranks_train_like_one_process(run_ranks, reference, tmp_path, ranks, zero_stage):
    if not reference:
        run = run_ranks(0, keep_gradients, (tmp_path,), batch_size=STRIDE, **FLAGS)
        reference |= {"run": run, "metrics": run.metrics, "val": validations(run)}
        reference["gradients"] = torch.load(tmp_path / "gradients_0.pt")
        for gradients, line in zip(reference["gradients"], run.metrics, strict=True):
            after_clip = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
            assert after_clip == pytest.approx(min(line["norm"], 0.7), rel=1e-4)
        assert any(line["norm"] > 0.7 for line in run.metrics)  # the clip has something to do
    run = run_ranks(
        ranks, keep_gradients, (tmp_path,), batch_size=STRIDE // ranks, zero_stage=zero_stage, sample_every=0, **FLAGS
    )
    assert len(run.metrics) == 8
    for ours, theirs in zip(run.metrics, reference["metrics"], strict=True):
        for key in ("loss", "norm", "lr", "tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert validations(run) == pytest.approx(reference["val"], rel=1e-5)
    for rank in range(ranks):
        for step, gradients in enumerate(torch.load(tmp_path / f"gradients_{rank}.pt")):
            for i, gradient in enumerate(gradients):
                assert_close(gradient, reference["gradients"][step][i], 1e-5, f"rank {rank}, step {step}, tensor {i}")
    assert_weights_agree(run, reference["run"], 1e-5)


def validations(run) -> list[float]:
    return [float(line.split("tel:")[1]) for line in run.log if "tel" in line]


def test_what_is_added_to_all_keys_changes_nothing():
    """So the biases of the keys have no gradient but rounding noise."""
    gpt = GPT(TINY).double()
    tokens = torch.randint(TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    before, _ = gpt(tokens, tokens)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if name.endswith("c_attn.bias"):
                p.tensor_split(3)[1].add_(0.5)
    after, _ = gpt(tokens, tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_stages_2_and_3_are_the_same_bits_in_bfloat16(run_ranks):
    flags = FLAGS | {"dtype": "bfloat16", "batch_size": 4, "recompute": 2, "val_loss_every": 0, "num_iterations": 5}
    second, third = (run_ranks(2, zero_stage=stage, **flags) for stage in (2, 3))
    assert second.losses == third.losses
    assert [line["norm"] for line in second.metrics] == [line["norm"] for line in third.metrics]
    assert same_weights(second, third)
    autocast = run_ranks(2, **flags)
    assert second.losses[0] == autocast.losses[0]  # the same arithmetic in the forward pass
    assert second.losses == pytest.approx(autocast.losses, rel=1e-4)


@pytest.mark.parametrize(("dtype", "zero_stage", "rel"), [("float32", 3, 1e-5), ("bfloat16", 1, 1e-3)])
def test_kernels_train_like_eager(run_ranks, dtype, zero_stage, rel):
    """Custom ops in DDP, and in a block that FSDP2 gathers and frees, with what is recomputed."""
    flags = {"num_iterations": 2, "batch_size": 1, "total_batch_size": 64, "dtype": dtype, "recompute": 2}
    eager = run_ranks(2, **flags)
    kernels = run_ranks(2, zero_stage=zero_stage, backend="triton", **flags)
    assert kernels.losses == pytest.approx(eager.losses, rel=rel)


def overflow_once(rank: int, zero_stage: int) -> None:
    """Make gradients of the second step overflow on the last rank: all of its own, or one in its shard."""
    backward, unscale, calls = torch.Tensor.backward, torch.amp.GradScaler.unscale_, []

    def blow_up(loss):
        calls.append(loss)
        backward(loss * (torch.inf if zero_stage < 2 and len(calls) == 4 and rank == 1 else 1))

    def unscale_after(self, optimizer):
        if zero_stage == 3 and len(calls) == 4 and rank == 1:
            next(p for group in optimizer.param_groups for p in group["params"]).grad.to_local().view(-1)[0] = torch.inf
        unscale(self, optimizer)

    torch.Tensor.backward = blow_up  # type: ignore[assignment]
    torch.amp.GradScaler.unscale_ = unscale_after


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_float16_lowers_its_scale_on_all_ranks_at_once_and_resumes_with_it(run_ranks, zero_stage):
    flags = FLAGS | {"zero_stage": zero_stage, "dtype": "float16", "checkpoint_every": 3, "batch_size": 4, "keep": 9}
    run = run_ranks(2, overflow_once, (zero_stage,), **flags)
    assert [line["skipped"] for line in run.metrics] == [0] + [1] * 7
    assert run.losses[-1] < run.losses[0]
    assert "step 2, " in run.screen and "update skipped" in run.screen
    again = run_ranks(2, **flags, resume=run.output_dir / "checkpoints" / "step_3")
    assert again.losses == run.losses[3:] and same_weights(again, run)
    assert [line["skipped"] for line in again.metrics] == [1] * 5
    for folder in (run.output_dir, again.output_dir):
        state = json.loads((folder / "checkpoints" / "step_8" / "state.json").read_text())
        assert state["scaler"]["scale"] == 65536 / 2


def test_files_do_not_depend_on_the_stage(run_ranks, tmp_path):
    """Validation, samples, weights for llm.c before and after, logs and transformers' folder, to the byte.

    Two ranks add two numbers, in either order; the clip is off, because the norm is summed in another order. The
    vocabulary is GPT-2's, so that there are samples.
    """
    write_model(
        tmp_path / "gpt2_small.bin", GPT(GPTConfig(block_size=32, vocab_size=50257, n_layer=1, n_head=1, n_embd=32))
    )
    flags = FLAGS | {"val_loss_every": 1, "sample_every": 2, "write_tensors": 1, "grad_clip": 0, "num_iterations": 2}
    flags |= {"model": tmp_path / "gpt2_small.bin", "batch_size": 4}
    runs = [run_ranks(2, zero_stage=stage, **flags) for stage in range(4)]
    for_c = {f"gpt2_small{kind}.bin" for kind in ("", "_bf16", "_debug_state")} | {"model.bin", "gpt2_tokenizer.bin"}
    samples = [[line for line in run.screen.splitlines() if line.startswith("sample: ")] for run in runs]
    assert len(samples[0]) == 2 and all(text == samples[0] for text in samples)
    for stage, run in enumerate(runs):
        assert {path.name for path in run.output_dir.glob("*.bin")} == for_c
        assert len(validations(run)) == 3
        same, *different = filecmp.cmpfiles(runs[0].output_dir, run.output_dir, {*for_c, "main.log"}, shallow=False)
        assert not any(different) and len(same) == 6, different
        hf.export(run.output_dir, tmp_path / f"hf_{stage}", vocabulary_files())
        names = [path.name for path in (tmp_path / "hf_0").iterdir()]
        same, *different = filecmp.cmpfiles(tmp_path / "hf_0", tmp_path / f"hf_{stage}", names, shallow=False)
        assert not any(different) and "model.safetensors" in same, different
    exported = dict(hf.from_pretrained(str(tmp_path / "hf_3")).named_parameters())
    assert all(torch.equal(exported[name], weight) for name, weight in weights_of(runs[0]).items())


def test_check_on_every_rank(run_ranks):
    """It comes before anything is sharded, so that each rank has the whole network; nothing is written."""
    run = run_ranks(2, zero_stage=3, check=1, batch_size=1, total_batch_size=32)
    assert not run.output_dir.exists() and "no worse than eager" in run.screen


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_gradients_are_reduced_in_the_last_micro_step_alone(zero_stage):
    """One process plays a rank of two, in a group that computes nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        gpt = GPT(TINY)
        world = distributed.World(0, 0, 2, torch.device("cpu"), distributed=True)
        model, _ = distributed.parallelize(gpt, world, zero_stage, "float32", compile=False)
        params = dict(gpt.named_parameters())
        reduced = []
        if zero_stage < 2:
            model.register_comm_hook(reduced, unreduced)  # type: ignore[operator]
        idx = torch.arange(32)[None] % TINY.vocab_size
        kept = []
        for micro_step in range(3):
            distributed.synchronise_gradients(model, micro_step == 2, zero_stage)
            model(idx, idx, return_logits=False)[1].backward()
            was_reduced = bool(reduced) if zero_stage < 2 else all(p.grad is not None for p in params.values())
            assert was_reduced == (micro_step == 2)
            kept.append(isinstance(next(gpt.parameters()), DTensor))
        assert kept == ([False] * 3 if zero_stage == 0 else [zero_stage == 3] * 2 + [True])  # sharded again
    finally:
        dist.destroy_process_group()


def without_code_generation(rank: int) -> None:
    """torch.compile with everything but the compiler for the device."""
    compile = torch.compile
    torch.compile = lambda model, **options: compile(model, backend="aot_eager", **options)  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_compiled_ranks_train_like_eager_ones(run_ranks, zero_stage, dtype):
    flags = FLAGS | {"num_iterations": 3, "batch_size": 4, "zero_stage": zero_stage, "dtype": dtype}
    eager = run_ranks(2, **flags)
    compiled = run_ranks(2, without_code_generation, **flags, compile=1)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-6 if dtype == "float32" else 1e-3)


def test_the_screen_is_written_once(run_ranks):
    """With all ranks on one, as under torchrun."""
    run = run_ranks(2, restarts=0, num_iterations=2, zero_stage=2)
    assert run.screen.count("| train loss") == 2
    assert "2 ranks × 1 micro-steps = 128 tokens" in run.screen
