"""Pretrain GPT-2: `python train.py` trains on the spot, `torchrun --nproc_per_node 8 train.py ...` on many GPUs.

`python train.py --help` lists the flags. The loop is `train`, below; everything before it sets up, everything after
it is what the loop calls.
"""

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean as average

import torch

from common import (
    BadInput,
    atomic_write,
    exclusive,
    exit_on_bad_input,
    lenient_streams,
    print0,
    print_error,
    refuse_if_occupied,
    write_errors,
)
from data.loader import ShardLoader
from data.prepare import prepare_pydoc
from data.shards import shard_pattern
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding, token_bytes
from kernels import ops
from model import llmc
from model.gpt import GPT
from model.load import load
from training import checkpoint, distributed, optim
from training.check import check
from training.checkpoint import Checkpoints, TrainState
from training.config import Config, parse, shell_path
from training.distributed import RunStopped, StopRequest, World
from training.faults import UpdateGuard, Watchdog, compare_ranks
from training.flops import flops_per_token, peak_flops
from training.log import RunLog, peak_memory_mib
from training.saved import launch_of
from training.step import Batch, autocast_to, clip, forward_backward

SEED = 42
INTERRUPTED = 130
"""exit status of a run that Ctrl-C ended, as shells count it"""
RUN_CONFIG = "config.json"
STOPPED = 1
"""exit status of a run that could not go on"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (None: this process's own) and return the exit status."""
    lenient_streams()
    with exit_on_bad_input("train.py"), contextlib.ExitStack() as held:
        config = parse(argv)
        try:
            world = distributed.start(config.device, config.zero_stage, config.timeout_s)
            watchdog = Watchdog(world)
            with watchdog.watching():
                status = run(config, world, watchdog, held)
            distributed.stop(world)
            return status
        except RunStopped as stopped:
            print_error(f"train.py: {stopped}")
            return STOPPED


def run(config: Config, world: World, watchdog: Watchdog, held: contextlib.ExitStack) -> int:
    """Set everything up, train, and leave the results in the run directory, which is `held` against other runs."""
    given = config
    stop = StopRequest().install()
    torch.manual_seed(SEED)  # on every device, the same on every rank
    if config.tensorcores:
        torch.set_float32_matmul_precision("high")
    config = config.resolved(world.device.type, world.size)
    table = choose_ops(config, world)
    require_cache_folder()  # imports triton, which choose_ops has to prepare
    gpt = load(config.model, table)
    gpt.set_recompute(config.recompute)
    try_code_generation(config, world, gpt.ops)
    config = check_against_model(config, gpt)
    config, train_loader, val_loader = open_data(config, world, gpt)
    if config.check:
        return check_backend(config, world, gpt, train_loader)
    facts = run_facts(config, world, gpt)
    output_dir, restarted = distributed.on_main(world, lambda: choose_output_dir(config, world, held))
    resumed = find_checkpoint(config, world, train_loader, facts, output_dir, restarted)
    first_step = checkpoint.step_of(resumed) if resumed else 0
    log = RunLog(output_dir if world.is_main else None, f"{config.model} on {world.size} × {device_name(world)}")

    def begin() -> None:
        make_output_dir(output_dir, config, restarted, gpt, held)
        log.open(first_step, bool(config.tensorboard))
        describe(config, world, gpt, train_loader, resumed)
        if output_dir:
            write_config(output_dir / RUN_CONFIG, config, facts | {"launch": world.launch})
            for name in checkpoint.tidy(output_dir, first_step):
                print0(f"set aside {name}: its steps come again")
            if config.write_tensors and not resumed:
                write_tensors(output_dir, config, gpt, train_loader, world.device)

    distributed.on_main(world, begin)
    gpt.to(world.device)
    model, network = distributed.spread(gpt, world, config.zero_stage, config.dtype, bool(config.compile))
    params = dict(gpt.named_parameters())
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    guard = UpdateGuard(config.skip_loss_z, config.skip_norm_z)
    state = TrainState(gpt, params, optim.build(gpt, config), scaler, train_loader, guard, world.device)
    saves_to = None if config.inference_only else output_dir
    checkpoints = Checkpoints(saves_to, world, facts, config.keep, config.keep_every)
    if resumed:
        checkpoints.load(resumed, state)
    if config.checkpoint_every:
        checkpoints.warm_up(state)

    try:
        status = train(config, world, state, model, network, val_loader, log, checkpoints, watchdog, stop)
    except BadInput as error:
        checkpoints.wait()
        raise BadInput(f"step {state.step + 1}: {error}") from error
    except RunStopped as stopped:
        checkpoints.wait()
        raise RunStopped(f"{stopped}; {checkpoints.newest()}") from stopped

    watchdog.at(state.step, "writing the weights")
    checkpoints.wait()
    if state.step < config.num_iterations and any(distributed.gather(world, checkpoints.failed)):
        status = STOPPED  # who preempts a run shall not take it for saved
    log.close()
    if output_dir and not config.inference_only:
        write_weights(output_dir / llmc.RUN_WEIGHTS, state, world)
    distributed.barrier(world)
    if output_dir and world.is_main:
        resumable = state.step < config.num_iterations and checkpoint.find(output_dir / checkpoint.FOLDER)
        conclude(given, world, output_dir, bool(resumable))
    return status


def train(
    config: Config,
    world: World,
    state: TrainState,
    model: torch.nn.Module,
    network: torch.nn.Module,
    val_loader: ShardLoader | None,
    log: RunLog,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    stop: StopRequest,
) -> int:
    """The loop, from `state.step` on. Updates `state` in place and returns the exit status.

    Backward passes of `model` average gradients over the ranks; `network` is the same without, for forward passes.
    """
    gpt, train_loader, optimizer, scaler = state.gpt, state.loader, state.optimizer, state.scaler
    autocast = autocast_to(getattr(torch, config.dtype), world.device)
    grad_accum_steps = config.grad_accum_steps(world.size)
    if not config.inference_only:
        distributed.settle_buckets(model, world, (config.batch_size, config.sequence_length), autocast)
    peak = peak_flops(device_name(world), config.dtype, config.tensorcores)
    step_times = []

    for step in range(state.step, config.num_iterations + 1):
        last_step = step == config.num_iterations
        if val_loader and is_due(config.val_loss_every, step, last_step):
            watchdog.at(step, "validation")
            val_loss = validate(network, val_loader, autocast, config, world)
            log.validation(step, val_loss)
            print0(f"val loss {val_loss:.6f}")
        if is_due(config.sample_every, step, last_step):
            watchdog.at(step, "sample")
            with autocast:
                text = sample(gpt, world.device)
            print0(f"sample: {text!r}")
        if last_step:
            break

        started = time.perf_counter()
        if config.overfit_single_batch:
            train_loader.reset()
        where = f"step {step + 1}, {train_loader.where()}"
        batches = micro_batches(train_loader, step, watchdog)
        loss = forward_backward(
            model, batches, grad_accum_steps, autocast, scaler, config.zero_stage, backward=not config.inference_only
        )
        norm = torch.zeros_like(loss)
        lr = optim.learning_rate(step, config)
        if not config.inference_only:
            norm = clip(state.params.values(), optimizer, scaler, config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = lr

        # One small reduction a step, so that all ranks decide alike: loss and norm, and whether one was asked to stop.
        asked = torch.tensor([stop.interrupted, stop.preempted], dtype=torch.float32, device=world.device)
        numbers = torch.cat([torch.stack([loss, norm]), asked])
        loss, norm, interrupted, preempted = distributed.mean(numbers, world).tolist()
        if not config.inference_only:
            objection = state.guard.objection(where, loss, norm)
            if objection:
                print0(objection)
            optim.update(optimizer, scaler, accepted=not objection)
        state.step = step + 1
        distributed.wait_for_device(world)
        seconds = time.perf_counter() - started
        step_times.append(seconds)
        state.tokens += config.total_batch_size
        tok_per_s = config.total_batch_size / seconds
        flops = flops_per_token(gpt.config, config.sequence_length) * (1 / 3 if config.inference_only else 1)
        metrics = {
            "step": step,
            "tokens": state.tokens,
            "loss": loss,
            "norm": None if config.inference_only else norm,
            "lr": lr,
            "ms": 1e3 * seconds,
            "tok_per_s": tok_per_s,
            "mfu": flops * tok_per_s / (peak * world.size) if peak else None,
            "memory_mib": peak_memory_mib(world.device),
            "skipped": state.guard.skipped,
        }
        log.train(metrics)
        print0(step_line(metrics, config.num_iterations))
        if is_due(config.check_ranks_every, state.step, last_step=False):
            watchdog.at(step, "comparing the ranks")
            compare_ranks(world, state.step, state.params, {"the loader's position": train_loader.state_dict()})
        ends = interrupted or preempted or state.step == config.num_iterations
        if checkpoints.folder and (is_due(config.checkpoint_every, state.step, ends) or preempted):
            watchdog.at(step, "saving")
            log.sync()  # what is on disk tells of every step up to the checkpoint, also after the power failed
            checkpoints.save(state)
        checkpoints.poll()
        if (interrupted or preempted) and state.step < config.num_iterations:
            signal_name = "Ctrl-C" if interrupted else "SIGTERM, SIGUSR1 or SIGHUP"
            print0(f"stopped by {signal_name} after step {step + 1} of {config.num_iterations}")
            break

    if step_times:
        recent = step_times[1:][-20:] or step_times
        memory = peak_memory_mib(world.device)
        peak_memory = "" if memory is None else f" | peak memory {memory:,.0f} MiB"
        print0(f"mean of the last {len(recent)} steps {1e3 * average(recent):.1f} ms{peak_memory}")
    return INTERRUPTED if state.step < config.num_iterations and not preempted else 0


def is_due(every: int, step: int, last_step: bool) -> bool:
    """True on every `every`-th step and on the last; never where `every` is 0."""
    return every > 0 and (step % every == 0 or last_step)


def micro_batches(loader: ShardLoader, step: int, watchdog: Watchdog) -> Iterator[Batch]:
    """The batches to come, read when they are asked for; the watchdog is told what this rank is doing."""
    while True:
        watchdog.at(step, "reading data")
        batch = loader.next_batch()
        watchdog.at(step, "forward and backward")
        yield batch


@torch.no_grad()
def validate(network: torch.nn.Module, loader: ShardLoader, autocast, config: Config, world: World) -> float:
    """Mean loss in nats of the first `val_max_steps` batches, over all ranks."""
    loader.reset()
    total = torch.zeros((), device=world.device)
    for _ in range(config.val_max_steps):
        x, y = loader.next_batch()
        with autocast:
            _, loss = network(x, y, return_logits=False)
        total += loss / config.val_max_steps
    return distributed.mean(total, world).item()


def sample(gpt: GPT, device: torch.device) -> str:
    """32 tokens after end-of-text, at temperature 1 among the 40 likeliest. Every rank takes part."""
    start = torch.full((1, 1), END_OF_TEXT, dtype=torch.int64, device=device)
    ids = gpt.generate(start, max_new_tokens=32, temperature=1.0, top_k=40)
    return gpt2_encoding().decode(ids[0, 1:].tolist())


def choose_ops(config: Config, world: World) -> ops.Ops:
    """The table of ops that `--backend` names."""
    try:
        table = ops.parse(config.backend, world.device.type, bool(config.flash))
    except (ImportError, ValueError, RuntimeError) as error:
        raise BadInput(f"--backend {config.backend}: {error}") from error
    if config.flash and table.attention is not ops.EAGER_SDPA.attention:
        raise BadInput(
            f"--flash 1 is for eager attention, and that of --backend {config.backend} is a Triton kernel; give "
            "--flash 0, --backend eager or --backend triton,attention=eager"
        )
    return table


def require_cache_folder() -> None:
    """See that torch has a folder for what it compiles. It makes one in every process, also where it compiles nothing.

    Raises:
        BadInput: it cannot make it.
    """
    try:
        torch.optim.SGD([torch.zeros(1)])  # imports torch's compiler, as every optimizer does
    except OSError as error:
        raise BadInput(
            f"torch has no folder for temporary files ({error.strerror or error}); name one that can be written to in "
            "TMPDIR, or in TORCHINDUCTOR_CACHE_DIR if that is set"
        ) from error


def try_code_generation(config: Config, world: World, table: ops.Ops) -> None:
    """Compile one small op in each way that this run is going to, as a trial.

    What Triton and torch.compile lack (a compiler, a cache folder that can be written to) would else be found out in
    the first step, when the run directory is made and others may have been waited for.

    Raises:
        BadInput: it fails.
    """
    x = torch.ones(8, device=world.device)
    flag, needed = f"--backend {config.backend}", "a C compiler (CC) and a cache folder (TRITON_CACHE_DIR)"
    try:
        table.gelu(x)
        if config.compile:
            flag, needed = "--compile 1", "a C++ compiler (CXX) and a cache folder (TORCHINDUCTOR_CACHE_DIR)"
            torch.compile(lambda x: x * table.gelu(x), fullgraph=True)(x)
    except Exception as error:  # each version of torch and of Triton has its own
        reason = str(error).partition("\n\n")[0] or type(error).__name__  # what follows is for torch's developers
        raise BadInput(f"{flag}: a trial failed: {reason}; it needs {needed}; or choose another value") from error


def check_backend(config: Config, world: World, gpt: GPT, loader: ShardLoader) -> int:
    """Check the backend on the first batch of every rank; return the exit status, 1 where a rank found it off."""
    x, y = loader.next_batch()
    right = check(gpt.to(world.device), x, y, getattr(torch, config.dtype))
    return 0 if distributed.mean(torch.tensor(float(right), device=world.device), world) == 1 else 1


def check_against_model(config: Config, gpt: GPT) -> Config:
    """Refuse what this network cannot do, and decide on samples, which need GPT-2's vocabulary."""
    if config.sequence_length > gpt.config.block_size:
        raise BadInput(
            f"--sequence_length {config.sequence_length} is longer than the block_size {gpt.config.block_size} of "
            f"--model {config.model}; give at most {gpt.config.block_size}"
        )
    speaks_gpt2 = gpt.config.vocab_size == VOCAB_SIZE
    if config.sample_every and not speaks_gpt2:
        raise BadInput(
            f"--sample_every needs GPT-2's vocabulary of {VOCAB_SIZE}, and --model {config.model} has "
            f"{gpt.config.vocab_size}; give --sample_every 0"
        )
    if config.sample_every is None:
        config = dataclasses.replace(config, sample_every=100 if speaks_gpt2 else 0)
    return config


def open_data(config: Config, world: World, gpt: GPT) -> tuple[Config, ShardLoader, ShardLoader | None]:
    """Open the shards, of the embedded corpus if none were named, and return what was chosen with the loaders."""
    if config.input_bin is None:
        distributed.on_main(world, prepare_pydoc)
        folder = prepare_pydoc()
        val = shard_pattern(folder, "val") if config.input_val_bin is None else config.input_val_bin
        config = dataclasses.replace(config, input_bin=shard_pattern(folder, "train"), input_val_bin=val)

    def loader(pattern: str, shuffle_seed: int | None = None) -> ShardLoader:
        return ShardLoader(
            pattern,
            config.batch_size,
            config.sequence_length,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            vocab_size=gpt.config.vocab_size,
            shuffle_seed=shuffle_seed,
        )

    train_loader = loader(config.input_bin, SEED if config.shuffle else None)
    val_loader = loader(config.input_val_bin) if config.input_val_bin else None
    for repeated in (train_loader.repeated(), train_loader.repeated(val_loader) if val_loader else None):
        if repeated:
            print0(f"warning: {repeated}")
    return config, train_loader, val_loader


def run_facts(config: Config, world: World, gpt: GPT) -> dict:
    """What decides a run, for config.json and for checkpoints."""
    return {
        "flags": config.deciding(),
        "network": dataclasses.asdict(gpt.config),
        "ranks": world.size,
        "zero_stage": config.zero_stage,
        "device": device_name(world),
        "versions": checkpoint.versions(),
    }


def choose_output_dir(config: Config, world: World, held: contextlib.ExitStack) -> tuple[Path | None, bool]:
    """The run directory. One that is there is held against other runs from now on, so that nobody changes the
    checkpoints in it.

    Returns:
        (the folder, which may have to be made; None for none, whether an earlier attempt of the same torchrun made it)

    Raises:
        BadInput: another run has it, or it cannot be looked at.
    """
    if config.output_dir == "":
        return None, False
    path = Path(config.output_dir) if config.output_dir else checkpoint.run_of(config.resume)
    if path is None:
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{llmc.size_name(config.model)}"
        path = Path("runs") / name
        for number in range(2, 100):  # another run started in the same second
            if not path.exists():
                break
            path = Path("runs") / f"{name}-{number}"
    with write_errors(f"--output_dir {path}"):  # it may not even be looked at
        if path.is_dir():
            held.enter_context(exclusive(path, "--output_dir"))
        there = world.restarts and (path / RUN_CONFIG).exists()
        restarted = there and launch_of(path / RUN_CONFIG) == world.launch
    return path, bool(restarted)


def find_checkpoint(
    config: Config, world: World, loader: ShardLoader, facts: dict, output_dir: Path | None, restarted: bool
) -> Path | None:
    """The checkpoint to go on from, with `loader` at its position; None to begin anew.

    Raises:
        BadInput: there is none where `--resume` says, or it is of another run than this one would be.
    """
    has_a_place = config.output_dir or checkpoint.run_of(config.resume)
    if world.max_restarts and config.checkpoint_every and not has_a_place:
        raise BadInput(
            "torchrun's --max-restarts goes on from checkpoints; name the --output_dir where it finds them, so that it "
            "is the same after a restart"
        )
    folder = None
    if config.resume == "auto" or restarted:
        folder = checkpoint.choose("auto", output_dir, world)
    if folder is None and config.resume != "auto":
        try:
            folder = checkpoint.choose(config.resume, None, world)
        except OSError as error:  # the path may not even be looked at
            raise BadInput(f"--resume {config.resume}: {error.strerror or error}; name a run directory") from error
    if folder is None:
        return None
    record = checkpoint.read_record(folder)
    shape = checkpoint.compare(record, facts, "network")
    if shape:
        raise BadInput(f"--resume {config.resume}: {folder} is of another network: {', '.join(shape)}; give that one")
    differences = checkpoint.compare(record, facts, "flags")
    if differences and not config.resume_override:
        raise BadInput(
            f"--resume {config.resume}: {folder} is of another run: {', '.join(differences)}; give what it was, or "
            "--resume_override 1"
        )
    try:
        loader.load_state_dict(record["loader"])
    except BadInput as error:
        if not config.resume_override:
            raise
        print0(f"reading the data from the beginning: {error}")
    return folder


def make_output_dir(path: Path | None, config: Config, restarted: bool, gpt: GPT, held: contextlib.ExitStack) -> None:
    """Create the run directory and hold it against other runs, or see that this run may go on in it.

    Raises:
        BadInput: it holds something else, another run has it, or the disk cannot hold the weights.
    """
    if path is None:
        return
    home = checkpoint.run_of(config.resume)
    is_home = home is not None and home.resolve() == path.resolve()
    goes_on = config.resume == "auto" and (path / RUN_CONFIG).exists()
    if not (is_home or goes_on or restarted):
        refuse_if_occupied(path)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    needed = 4 * gpt.config.num_params() * (4 if config.write_tensors else 1)
    if config.checkpoint_every:  # weights and two moments; a new one is written before the oldest goes
        there = len(checkpoint.find(path / checkpoint.FOLDER))
        needed += 12 * gpt.config.num_params() * (config.keep + 1 - min(there, config.keep))
    if free < needed:
        raise BadInput(
            f"--output_dir {path}: the disk has {free / 2**20:,.0f} MiB left and this run writes about "
            f"{needed / 2**20:,.0f}; free some space or name another folder"
        )
    if not path.is_dir():
        with write_errors(f"--output_dir {path}"):
            path.mkdir(parents=True)
        held.enter_context(exclusive(path, "--output_dir"))


def write_config(path: Path, config: Config, facts: dict) -> None:
    """Write down what decided this run."""
    record = facts | {"flags": dataclasses.asdict(config)}
    with atomic_write(path) as file:
        file.write(json.dumps(record, indent=2).encode() + b"\n")


def write_tensors(output_dir: Path, config: Config, gpt: GPT, loader: ShardLoader, device: torch.device) -> None:
    """Write the weights, a debug state of the first batch and the tokenizer for llm.c, before the first update."""
    prefix = f"gpt2_{llmc.size_name(config.model)}"
    llmc.write_model(output_dir / f"{prefix}.bin", gpt)
    llmc.write_model(output_dir / f"{prefix}_bf16.bin", gpt, torch.bfloat16)
    x, y = loader.next_batch()
    loader.reset()
    state = llmc.debug_state(gpt, x, y, device)
    llmc.write_debug_state(output_dir / f"{prefix}_debug_state.bin", gpt.config, state)
    if gpt.config.vocab_size == VOCAB_SIZE:
        llmc.write_tokenizer(output_dir / "gpt2_tokenizer.bin", token_bytes(), END_OF_TEXT)


def write_weights(path: Path, state: TrainState, world: World) -> None:
    """Write the weights, whole whatever the stage. Every rank takes part, and one writes."""
    weights = distributed.FullWeights(state.params)
    if world.is_main:
        llmc.write_model(path, (state.gpt.config, weights))
    else:
        for name in llmc.tensor_shapes(state.gpt.config):  # in the order in which the other asks for them
            weights[name]


def describe(config: Config, world: World, gpt: GPT, loader: ShardLoader, resumed: Path | None) -> None:
    """Say what is about to be trained, on what, with what."""
    decaying, others = (group["params"] for group in optim.parameter_groups(gpt, config.weight_decay))
    print0(
        f"model {config.model}: {gpt.config.num_params():,} parameters | "
        f"{len(decaying)} tensors ({sum(p.numel() for p in decaying):,} parameters) decay, "
        f"{len(others)} ({sum(p.numel() for p in others):,}) do not"
    )
    print0(f"data {config.input_bin}: {loader.total_tokens:,} tokens in {len(loader.files)} shards")
    print0(
        f"batch: {config.batch_size} × {config.sequence_length} tokens × {world.size} ranks × "
        f"{config.grad_accum_steps(world.size)} micro-steps = {config.total_batch_size:,} tokens an update"
    )
    print0(f"device {device_name(world)} | backend {config.backend} | dtype {config.dtype} | torch {torch.__version__}")
    if resumed:
        print0(f"resumed from {resumed}: {checkpoint.step_of(resumed)} of {config.num_iterations} steps are done")


def conclude(config: Config, world: World, output_dir: Path, resumable: bool) -> None:
    """Say where everything is, and what can be done with it, in lines for a shell."""
    with write_errors(output_dir):
        names = sorted(path.name for path in output_dir.iterdir())
    print0(f"\nrun directory: {output_dir} ({', '.join(names)})")
    if resumable:
        launcher = "torchrun ..." if world.distributed else "python"
        print0(f"resume: {launcher} train.py {config.command_line(output_dir=str(output_dir), resume='auto')}")
    if not config.inference_only:
        print0(f"go on from these weights:    python train.py --model {shell_path(output_dir)}")
        print0(f"take them to transformers:   python -m model.hf export {shell_path(output_dir)} FOLDER")


def step_line(metrics: dict[str, float | None], num_iterations: int) -> str:
    """What the screen shows of an update."""
    norm = "" if metrics["norm"] is None else f" | norm {metrics['norm']:.4f}"
    mfu = "" if metrics["mfu"] is None else f" | {100 * metrics['mfu']:.1f}% MFU"
    width = len(str(num_iterations))
    return (
        f"step {metrics['step'] + 1:>{width}}/{num_iterations} | train loss {metrics['loss']:.6f}{norm}"
        f" | lr {metrics['lr']:.2e} | {metrics['ms']:.1f} ms | {metrics['tok_per_s']:,.0f} tok/s{mfu}"
    )


def device_name(world: World) -> str:
    """The GPU's name as CUDA gives it, or the kind of device."""
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type


if __name__ == "__main__":
    sys.exit(main())
