"""Pretrain GPT-2: `python train.py` trains on the spot, `torchrun --nproc_per_node 8 train.py ...` on many GPUs.

`python train.py --help` lists the flags. `run` sets up, `train` is the loop, and what these two call follows.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean as average

import torch

from common import BadInput, exit_on_bad_input, lenient_streams, print0, print_error
from data.loader import ShardLoader
from data.prepare import prepare_pydoc
from data.shards import shard_pattern
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, gpt2_encoding
from evals.tasks import Evaluations
from model.gpt import GPT
from model.load import load
from training import backend, checkpoint, distributed, graph, memory, optim, run_dir
from training.check import check
from training.checkpoint import Checkpoints, TrainState
from training.config import Config, parse
from training.distributed import RunStopped, StopRequest, World
from training.faults import UpdateGuard, Watchdog, compare_ranks
from training.flops import flops_per_token, peak_flops
from training.log import RunLog, peak_memory_mib, step_line
from training.step import Batch, Update

SEED = 42
INTERRUPTED = 130
"""exit status of a run that Ctrl-C ended, as shells count it"""
STOPPED = 1
"""exit status of a run that could not continue"""


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
    """Set up, train, and write the results to the run directory, which stays locked until `held` is closed."""
    given = config
    stop = StopRequest().install()
    torch.manual_seed(SEED)  # on every device, the same on every rank
    if config.tensorcores:
        torch.set_float32_matmul_precision("high")
    config = config.resolved(world.device.type)
    graph.require_one_gpu(config, world)
    if world.device.type == "cpu":
        backend.keep_freed_memory()
    table = backend.choose_ops(config, world.device.type)
    backend.require_cache_folder()
    try:
        gpt = load(config.model, table)
    except BadInput as error:
        raise BadInput(f"--model {error}") from error
    gpt.set_recompute(config.recompute)
    gpt.residual_dtype = None if config.residual_dtype == "float32" else getattr(torch, config.residual_dtype)
    backend.try_code_generation(config, world.device, gpt.ops)
    config = check_against_model(config, gpt)
    config, train_loader, val_loader = open_data(config, world, gpt)
    if config.check:
        return check_backend(config, world, gpt, train_loader)
    evaluations = Evaluations(config.evals, gpt.config, world)
    metadata = run_dir.metadata_of(config, world, gpt)
    output_dir, restarted = distributed.on_main(world, lambda: run_dir.choose(config, world, held))
    resumed = run_dir.find_checkpoint(config, world, train_loader, metadata, output_dir, restarted)
    first_step = checkpoint.step_of(resumed) if resumed else 0
    log = RunLog(output_dir if world.is_main else None, f"{config.model} on {world.size} × {world.device_name}")

    def begin() -> None:
        if output_dir:
            run_dir.make(output_dir, config, restarted, gpt, held)
        log.open(first_step, bool(config.tensorboard))
        describe(config, world, gpt, train_loader, resumed)
        if output_dir:
            run_dir.write_config(output_dir, config, metadata, world)
            for name in checkpoint.remove_leftovers(output_dir, first_step):
                print0(f"set aside {name}: its steps will be repeated")
            if config.write_tensors and not resumed:
                run_dir.write_tensors(output_dir, config, gpt, train_loader, world.device)

    distributed.on_main(world, begin)
    gpt.to(world.device)
    model, network = distributed.parallelize(gpt, world, config.zero_stage, config.dtype, bool(config.compile))
    params = dict(gpt.named_parameters())
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.dtype == "float16")
    guard = UpdateGuard(config.skip_loss_z, config.skip_norm_z)
    state = TrainState(gpt, params, optim.build(gpt, config), scaler, train_loader, guard, world.device)
    saves_to = None if config.inference_only else output_dir
    checkpoints = Checkpoints(saves_to, world, metadata, config.keep, config.keep_every)
    if resumed:
        checkpoints.load(resumed, state)
    if config.checkpoint_every:
        checkpoints.warm_up(state)

    update = graph.build(config, world, state, model)
    try:
        status = train(config, world, state, update, network, val_loader, evaluations, log, checkpoints, watchdog, stop)
    except BadInput as error:
        checkpoints.wait()
        raise BadInput(f"{watchdog.place}: {error}") from error
    except RunStopped as stopped:
        checkpoints.wait()
        raise RunStopped(f"{stopped}; {checkpoints.newest()}") from stopped

    watchdog.at(state.step, "writing the weights")
    checkpoints.wait()
    finished = state.step >= config.num_iterations
    if not finished and any(distributed.gather(world, checkpoints.failed)):
        status = STOPPED  # a failed save must not look like success to the scheduler
    log.close()
    if output_dir and not config.inference_only:
        run_dir.write_weights(output_dir, state, world)
    distributed.barrier(world)
    if output_dir and world.is_main:
        run_dir.summarize(output_dir, given, world, finished)
    return status


def train(
    config: Config,
    world: World,
    state: TrainState,
    update: Update,
    network: torch.nn.Module,
    val_loader: ShardLoader | None,
    evaluations: Evaluations,
    log: RunLog,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    stop: StopRequest,
) -> int:
    """The loop, from `state.step` on. Updates `state` in place and returns the exit status.

    `update` averages gradients over the ranks; `network` is for forward passes alone.
    """
    gpt, train_loader, autocast = state.gpt, state.loader, update.autocast
    if not config.inference_only:
        distributed.warm_up_ddp(update.model, world, (config.batch_size, config.sequence_length), autocast)
    peak = peak_flops(world.device_name, config.dtype, config.tensorcores)
    step_times = []
    first_step, began = state.step, time.perf_counter()

    for step in range(state.step, config.num_iterations + 1):  # the number of updates done
        last_step = step == config.num_iterations
        if val_loader and is_due(config.val_loss_every, step, last_step):
            watchdog.at(step, "validation")
            val_loss = validate(network, val_loader, autocast, config, world)
            log.validation(step, val_loss)
            print0(f"val loss {val_loss:.6f}")
        if is_due(config.eval_every, step, last_step):
            n_tokens = config.batch_size * config.sequence_length
            log.evaluation(step, evaluations.run(gpt, autocast, n_tokens, step, watchdog.at))
        if is_due(config.sample_every, step, last_step):
            watchdog.at(step, "sample")
            with autocast:
                text = sample(gpt, world.device, n_tokens=96 if last_step else 32)
            print0(f"sample: {text if last_step else repr(text)}")
        if last_step:
            break

        started = time.perf_counter()
        if config.overfit_single_batch:
            train_loader.reset()
        where = f"step {step + 1}, {train_loader.where()}"
        batches = micro_batches(train_loader, step + 1, watchdog)
        loss, norm = update.gradients(batches)
        lr = optim.learning_rate(step, config)

        # One small reduction a step, so that all ranks decide alike: loss and norm, and whether one was asked to stop.
        asked = torch.tensor([stop.interrupted, stop.preempted], dtype=torch.float32, device=world.device)
        numbers = torch.cat([torch.stack([loss, norm]), asked])
        loss, norm, interrupted, preempted = distributed.mean(numbers, world).tolist()
        if not config.inference_only:
            reason_to_skip = state.guard.reason_to_skip(where, loss, norm)
            if reason_to_skip:
                print0(reason_to_skip)
            update.apply(lr, accepted=not reason_to_skip)
        state.step = step + 1
        distributed.wait_for_device(world)
        seconds = time.perf_counter() - started
        step_times.append(seconds)
        state.tokens += config.total_batch_size
        tok_per_s = config.total_batch_size / seconds
        flops = flops_per_token(gpt.config, config.sequence_length) * (1 / 3 if config.inference_only else 1)
        metrics = {
            "step": state.step,
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
        seconds_per_step = (time.perf_counter() - began) / (state.step - first_step)
        print0(step_line(metrics, config.num_iterations, seconds_per_step))
        if is_due(config.check_ranks_every, state.step, last_step=False):
            watchdog.at(state.step, "comparing the ranks")
            compare_ranks(world, state.step, state.params, {"the loader's position": train_loader.state_dict()})
        ends = interrupted or preempted or state.step == config.num_iterations
        if checkpoints.folder and (is_due(config.checkpoint_every, state.step, ends) or preempted):
            watchdog.at(state.step, "saving")
            log.sync()  # the logs on disk have every step up to the checkpoint, even after a power failure
            checkpoints.save(state)
        checkpoints.poll()
        if (interrupted or preempted) and state.step < config.num_iterations:
            signal_name = "Ctrl-C" if interrupted else "SIGTERM, SIGUSR1 or SIGHUP"
            print0(f"stopped by {signal_name} after step {state.step} of {config.num_iterations}")
            break

    if step_times:
        recent = step_times[1:][-20:] or step_times
        memory = peak_memory_mib(world.device)
        peak_memory = "" if memory is None else f" | peak memory {memory:,.0f} MiB"
        print0(f"mean of the last {len(recent)} steps {1e3 * average(recent):.1f} ms{peak_memory}")
    return INTERRUPTED if state.step < config.num_iterations and not preempted else 0


def is_due(every: int | None, step: int, last_step: bool) -> bool:
    """True on every `every`-th step and on the last; never if `every` is 0."""
    return bool(every and (step % every == 0 or last_step))


def micro_batches(loader: ShardLoader, step: int, watchdog: Watchdog) -> Iterator[Batch]:
    """The next batches, each read when it is asked for. The watchdog learns what this rank is doing."""
    while True:
        watchdog.at(step, "reading data")
        batch = loader.next_batch()
        watchdog.at(step, "forward and backward")
        yield batch


@torch.no_grad()
def validate(
    network: torch.nn.Module, loader: ShardLoader, autocast: torch.autocast, config: Config, world: World
) -> float:
    """Mean loss in nats of the first `val_max_steps` batches, over all ranks."""
    loader.reset()
    total = torch.zeros((), device=world.device)
    for _ in range(config.val_max_steps):
        x, y = loader.next_batch()
        with autocast:
            _, loss = network(x, y, return_logits=False)
        total += loss / config.val_max_steps
    return distributed.mean(total, world).item()


def sample(gpt: GPT, device: torch.device, n_tokens: int) -> str:
    """Tokens after end-of-text, at temperature 1 among the 40 likeliest. Every rank takes part."""
    start = torch.full((1, 1), END_OF_TEXT, dtype=torch.int64, device=device)
    ids = gpt.generate(start, max_new_tokens=n_tokens, temperature=1.0, top_k=40)
    return gpt2_encoding().decode(ids[0, 1:].tolist())


def check_backend(config: Config, world: World, gpt: GPT, loader: ShardLoader) -> int:
    """Check the backend on the first batch of every rank. Returns the exit status: 1 if any rank found an error."""
    x, y = loader.next_batch()
    right = check(gpt.to(world.device), x, y, getattr(torch, config.dtype))
    return 0 if distributed.mean(torch.tensor(float(right), device=world.device), world) == 1 else 1


def check_against_model(config: Config, gpt: GPT) -> Config:
    """Refuse what this network cannot do, and turn samples on if it has GPT-2's vocabulary."""
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
    """Open the shards, by default the embedded corpus's. Returns (config with their names, training, validation)."""
    train_pattern, val_pattern = config.input_bin, config.input_val_bin
    if train_pattern is None:
        distributed.on_main(world, prepare_pydoc)
        folder = prepare_pydoc()
        train_pattern = shard_pattern(folder, "train")
        val_pattern = shard_pattern(folder, "val") if val_pattern is None else val_pattern
    config = dataclasses.replace(config, input_bin=train_pattern, input_val_bin=val_pattern)
    config = config.with_batch(world.size, lambda: memory.largest_batch(config, world, gpt))

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

    train_loader = loader(train_pattern, SEED if config.shuffle else None)
    val_loader = loader(val_pattern) if val_pattern else None
    for repeated in (train_loader.repeated(), train_loader.repeated(val_loader) if val_loader else None):
        if repeated:
            print0(f"warning: {repeated}")
    return config, train_loader, val_loader


def describe(config: Config, world: World, gpt: GPT, loader: ShardLoader, resumed: Path | None) -> None:
    """Print the model, the data, the batch and the device."""
    decaying, others = (group["params"] for group in optim.parameter_groups(gpt, config.weight_decay))
    print0(
        f"model {config.model}: {gpt.config.num_params():,} parameters | "
        f"{len(decaying)} tensors ({sum(p.numel() for p in decaying):,} parameters) decay, "
        f"{len(others)} ({sum(p.numel() for p in others):,}) do not"
    )
    print0(f"data {config.input_bin}: {loader.total_tokens:,} tokens in {len(loader.files)} shards")
    print0(
        f"batch: {config.batch_size} × {config.sequence_length} tokens × {world.size} ranks × "
        f"{config.grad_accum_steps(world.size)} micro-steps = {config.total_batch_size:,} tokens per update"
    )
    print0(f"device {world.device_name} | backend {config.backend} | dtype {config.dtype} | torch {torch.__version__}")
    if resumed:
        print0(f"resumed from {resumed}: {checkpoint.step_of(resumed)} of {config.num_iterations} steps are done")


if __name__ == "__main__":
    sys.exit(main())
