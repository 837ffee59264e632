"""The run directory: which one it is, who holds it, what a run resumes from, and what it writes there beside its logs
(`training/log.py`) and its checkpoints (`training/checkpoint.py`)."""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from common import BadInput, atomic_write, exclusive, print0, refuse_if_occupied, write_errors
from data.loader import ShardLoader
from data.tokenizer import END_OF_TEXT, VOCAB_SIZE, token_bytes
from model import llmc
from model.gpt import GPT
from readers import read_json, text
from training import checkpoint, distributed
from training.checkpoint import TrainState
from training.config import Config, Resume, shell_path
from training.distributed import World
from training.saved import read_state, why

RUN_CONFIG = "config.json"


def metadata_of(config: Config, world: World, gpt: GPT) -> dict[str, Any]:
    """What decides a run, as it stands in config.json and in checkpoints."""
    return {
        "flags": config.deciding(),
        "network": dataclasses.asdict(gpt.config),
        "ranks": world.size,
        "zero_stage": config.zero_stage,
        "device": world.device_name,
        "versions": checkpoint.versions(),
    }


def choose(config: Config, world: World, held: contextlib.ExitStack) -> tuple[Path | None, bool]:
    """Choose the run directory. One that exists is held against other runs from now on, so that nobody changes the
    checkpoints in it.

    Returns:
        (the folder, which may have to be made; None for none, whether an earlier attempt of the same torchrun made it)

    Raises:
        BadInput: another run holds it, or it cannot be looked at.
    """
    if config.output_dir == "":
        return None, False
    path = Path(config.output_dir) if config.output_dir else config.resume_from.run
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
        restarted = world.restarts > 0 and (path / RUN_CONFIG).exists()
        return path, restarted and torchrun_id_of(path / RUN_CONFIG) == world.torchrun_id


def torchrun_id_of(config: Path) -> str | None:
    """The `World.torchrun_id` of the run that wrote a config.json.

    Raises:
        BadInput: it is no config.json of a run.
    """
    try:
        found = read_json(config, dict.fromkeys(("torchrun_id?", "launch?"), text(".{0,1000}")))
        return found.get("torchrun_id", found.get("launch"))  # as older run directories call it
    except (OSError, ValueError) as error:
        raise BadInput(f"{config} cannot be used: {why(error)}; name another --output_dir") from error


def find_checkpoint(
    config: Config,
    world: World,
    loader: ShardLoader,
    metadata: dict[str, Any],
    output_dir: Path | None,
    restarted: bool,
) -> Path | None:
    """The checkpoint to resume from, with `loader` at its position; None to start from scratch. Every rank takes part.

    Raises:
        BadInput: there is none where `--resume` says, or this run would be another than the one that wrote it.
    """
    resume = config.resume_from
    if world.max_restarts and config.checkpoint_every and not (config.output_dir or resume.run):
        raise BadInput(
            "torchrun's --max-restarts resumes from checkpoints; name the --output_dir where it finds them, so that it "
            "is the same after a restart"
        )
    folder = checkpoint.choose(Resume.parse("auto"), output_dir, world) if restarted else None
    folder = folder or checkpoint.choose(resume, output_dir, world)
    if folder is None:
        return None
    saved = read_state(folder)
    shape = checkpoint.differences(saved, metadata, "network")
    if shape:
        raise BadInput(f"--resume {resume.given}: {folder} has another network: {', '.join(shape)}; give that one")
    flags = checkpoint.differences(saved, metadata, "flags")
    if flags and not config.resume_override:
        raise BadInput(
            f"--resume {resume.given}: {folder} is of another run: {', '.join(flags)}; give the same values, or "
            "--resume_override 1"
        )
    try:
        loader.load_state_dict(saved["loader"])
    except BadInput as error:
        if not config.resume_override:
            raise
        print0(f"reading the data from the beginning: {error}")
    return folder


def make(path: Path, config: Config, restarted: bool, gpt: GPT, held: contextlib.ExitStack) -> None:
    """Make the run directory and hold it against other runs, or check that this run may continue in it.

    Raises:
        BadInput: it holds something else, another run holds it, or the disk cannot hold what this run writes.
    """
    resume = config.resume_from
    same_run = resume.run is not None and resume.run.resolve() == path.resolve()
    if not (same_run or restarted or (resume.auto and (path / RUN_CONFIG).exists())):
        refuse_if_occupied(path)
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    needed = 4 * gpt.config.num_params() * (4 if config.write_tensors else 1)
    if config.checkpoint_every:  # weights and two moments; a new one is written before the oldest is deleted
        n_saved = len(checkpoint.find(path / checkpoint.FOLDER))
        needed += 12 * gpt.config.num_params() * (config.keep + 1 - min(n_saved, config.keep))
    if free < needed:
        raise BadInput(
            f"--output_dir {path}: the disk has {free / 2**20:,.0f} MiB left and this run writes about "
            f"{needed / 2**20:,.0f}; free some space or name another folder"
        )
    if not path.is_dir():
        with write_errors(f"--output_dir {path}"):
            path.mkdir(parents=True)
        held.enter_context(exclusive(path, "--output_dir"))


def write_config(path: Path, config: Config, metadata: dict[str, Any], world: World) -> None:
    """Write config.json: every flag, and the rest of what decides this run."""
    content = metadata | {"flags": dataclasses.asdict(config), "torchrun_id": world.torchrun_id}
    with atomic_write(path / RUN_CONFIG) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def write_tensors(path: Path, config: Config, gpt: GPT, loader: ShardLoader, device: torch.device) -> None:
    """Write the weights, a debug state of the first batch and the tokenizer for llm.c, before the first update."""
    prefix = f"gpt2_{llmc.size_name(config.model)}"
    llmc.write_model(path / f"{prefix}.bin", gpt)
    llmc.write_model(path / f"{prefix}_bf16.bin", gpt, torch.bfloat16)
    x, y = loader.next_batch()
    loader.reset()
    state = llmc.debug_state(gpt, x, y, device)
    llmc.write_debug_state(path / f"{prefix}_debug_state.bin", gpt.config, state)
    if gpt.config.vocab_size == VOCAB_SIZE:
        llmc.write_tokenizer(path / "gpt2_tokenizer.bin", token_bytes(), END_OF_TEXT)


def write_weights(path: Path, state: TrainState, world: World) -> None:
    """Write the final weights, unsharded at every stage. Every rank takes part, and one writes."""
    weights = distributed.FullWeights(state.params)
    if world.is_main:
        llmc.write_model(path / llmc.RUN_WEIGHTS, (state.gpt.config, weights))
    else:
        for name in llmc.tensor_shapes(state.gpt.config):  # in the order in which rank 0 asks for them
            weights[name]


def summarize(path: Path, config: Config, world: World, finished: bool) -> None:
    """Print where everything is, and lines for a shell that use it.

    Args:
        path: the run directory.
        config: as it was given.
        world: the ranks.
        finished: whether all steps were done.
    """
    with write_errors(path):
        names = sorted(each.name for each in path.iterdir())
    print0(f"\nrun directory: {path} ({', '.join(names)})")
    if not finished and checkpoint.find(path / checkpoint.FOLDER):
        launcher = "torchrun ..." if world.distributed else "python"
        print0(f"resume: {launcher} train.py {config.command_line(output_dir=str(path), resume='auto')}")
    if not config.inference_only:
        print0(f"read what it writes:         python -m model.generate {shell_path(path)}")
        print0(f"train from these weights:    python train.py --model {shell_path(path)}")
        print0(f"export to transformers:      python -m model.hf export {shell_path(path)} FOLDER")
