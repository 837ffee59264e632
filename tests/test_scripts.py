"""The scripts for several nodes, with stand-ins for the scheduler: two tasks on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model import llmc
from tests.conftest import ROOT, command_line

SRUN = """#!/usr/bin/env bash
# Starts two tasks, passes USR1 on, and fails where one fails.
[[ $1 == --kill-on-bad-exit=1 ]] && shift
export SLURM_NTASKS=2
pids=()
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
trap 'kill -USR1 "${pids[@]}"' USR1
status=0
for pid in "${pids[@]}"; do
    while true; do wait "$pid"; code=$?; kill -0 "$pid" 2>/dev/null || break; done
    [[ $code -ne 0 ]] && status=$code
done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def environment(tmp_path):
    """A PATH on which srun and scontrol are the stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


ECHO = """#!/usr/bin/env bash
echo "$PWD" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR"
"""


@pytest.fixture
def echo(environment, tmp_path):
    """The scripts with a stand-in for torchrun and for python: one line of what each was started with, by a task."""
    for name in ("torchrun", "python"):
        (tmp_path / "bin" / name).write_text(ECHO)
        (tmp_path / "bin" / name).chmod(0o755)
    environment |= {"NODES": "1", "RENDEZVOUS": "here:0", "RUN": "tiny", "TMPDIR": str(tmp_path / "tmp")}
    environment = {key: value for key, value in environment.items() if not key.endswith("_CACHE_DIR")}
    (tmp_path / "tmp").mkdir()

    def run(script: str, **more: str) -> subprocess.CompletedProcess:
        command = ["bash", f"scripts/{script}"]
        return subprocess.run(command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=30)

    return run


SCRIPTS = {"torchrun.sh": 1, "train.slurm": 2}  # how often each starts something


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_starts_in_its_clone_with_cache_folders_of_its_own(echo, tmp_path, script):
    (tmp_path / "elsewhere" / "scripts").mkdir(parents=True)
    (tmp_path / "tmp" / f"tritongpt-{os.getuid()}").mkdir(mode=0o777)
    for _ in range(2):
        done = echo(script, CDPATH=str(tmp_path / "elsewhere"))
        own = tmp_path / "tmp" / f"tritongpt-{os.getuid()}"
        assert done.stdout.splitlines() == [f"{ROOT} {own}/triton {own}/inductor"] * SCRIPTS[script], done.stderr
        assert own.stat().st_mode & 0o777 == 0o700
    own.rmdir()
    done = echo(script, TRITON_CACHE_DIR="mine", TORCHINDUCTOR_CACHE_DIR="too")
    assert done.stdout.splitlines() == [f"{ROOT} mine too"] * SCRIPTS[script] and not own.exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["link", "file", "other owner"])
def test_cache_folder_that_is_not_ones_own_is_refused(echo, tmp_path, script, kind):
    own = tmp_path / "tmp" / f"tritongpt-{os.getuid()}"
    if kind == "link":
        (tmp_path / "taken").mkdir()
        own.symlink_to(tmp_path / "taken")
    elif kind == "file":
        own.touch()
    elif os.getuid() == 0:
        own.mkdir()
        os.chown(own, 1, 1)
    else:
        pytest.skip("only root can make a folder of somebody else")
    done = echo(script)
    assert (done.returncode, done.stdout) == (2, "")
    told = f"{own} is not a folder of your own; name others in TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR"
    assert done.stderr.splitlines() == [told] * SCRIPTS[script]
    assert not (tmp_path / "taken").exists() or not list((tmp_path / "taken").iterdir())


def test_slurm_job_whose_folder_is_gone_starts_nothing(echo, tmp_path):
    done = echo("train.slurm", SLURM_SUBMIT_DIR=str(tmp_path / "gone"))
    assert (done.returncode, done.stdout) == (2, "") and str(tmp_path / "gone") in done.stderr


def wait_for_step(log: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (log.exists() and f"s:{step} trl" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)


RANK = """import json, os, pathlib, signal, sys
attempt = len(list(pathlib.Path().glob(f"rank{os.environ['RANK']}_*")))
caught = []
signal.signal(signal.SIGUSR1, lambda *_: caught.append("USR1"))
started = {"argv": sys.argv[1:], **{name: os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}}
started["port"] = int(os.environ["MASTER_PORT"])
pathlib.Path(f"rank{os.environ['RANK']}_{attempt}").write_text(json.dumps(started))
status = json.loads(pathlib.Path("statuses").read_text())[attempt]
while isinstance(status, str) and not caught:  # USR1, and the status behind it
    signal.pause()
sys.exit(int(str(status).removeprefix("USR1 ")))
"""


@pytest.mark.parametrize(
    ("statuses", "last", "requeued"),
    [
        (["USR1 0"], 0, 1),
        (["USR1 1"], 1, 1),
        ([1, 1, 0], 0, 0),
        ([1, 1, 1, 1], 1, 0),
        ([2], 2, 0),
        ([1, "USR1 0"], 0, 1),
    ],
    ids=["time is up", "and saving fails", "two failures", "always failing", "bad input", "failure, then time is up"],
)
def test_slurm_job_starts_all_ranks_again_or_is_queued_again(environment, tmp_path, statuses, last, requeued):
    """With a stand-in for train.py, which ends by each of these statuses in turn, or at the signal."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "train.py").write_text(RANK)
    (tmp_path / "statuses").write_text(json.dumps(statuses))
    command = ["bash", str(ROOT / "scripts" / "train.slurm"), "--model", "d12"]
    job = subprocess.Popen(command, env=environment | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    if isinstance(statuses[-1], str):
        deadline, started = time.monotonic() + 30, [tmp_path / f"rank{rank}_{len(statuses) - 1}" for rank in (0, 1)]
        while not all(path.exists() and path.read_text() for path in started) and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == last
    assert len(list(tmp_path.glob("rank*_*"))) == 2 * len(statuses)
    seen = [[json.loads((tmp_path / f"rank{rank}_{i}").read_text()) for rank in (0, 1)] for i in range(len(statuses))]
    number = environment["SLURM_JOB_ID"]
    argv = ["--output_dir", f"runs/{number}", "--resume", "auto", "--checkpoint_every", "500", "--model", "d12"]
    for ranks in seen:
        for rank, of in enumerate(ranks):
            assert (of["argv"], of["LOCAL_RANK"], of["WORLD_SIZE"], of["MASTER_ADDR"]) == (
                argv,
                str(rank),
                "2",
                "127.0.0.1",
            )
    ports = [{of["port"] for of in ranks} for ranks in seen]
    assert all(len(port) == 1 for port in ports) and len(set.union(*ports)) == len(statuses)
    queue = tmp_path / "requeued"
    assert (queue.read_text() if queue.exists() else "") == f"requeue {number}\n" * requeued


@pytest.mark.slow  # the script is tested above, and signals to ranks in test_faults.py
def test_slurm_job_saves_when_its_time_is_up_and_resumes_when_requeued(environment, tiny, tmp_path):
    for name in ("train.py", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    flags = tiny | {"--num_iterations": "60", "--zero_stage": "1", "--output_dir": str(tmp_path / "run")}
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)

    def job(**more):
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "train.slurm"), *command_line(flags)],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = job()
    log = tmp_path / "run" / "main.log"
    wait_for_step(log, 5)
    first.send_signal(signal.SIGUSR1)
    screen, errors = first.communicate(timeout=90)
    assert first.returncode == 0, errors
    assert "stopped by SIGTERM, SIGUSR1 or SIGHUP" in screen
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"

    second = job(SLURM_JOB_ID=str(os.getpid() + 1))
    screen, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert "resumed from" in screen and (tmp_path / "requeued").read_text().count("\n") == 1
    steps = [line for line in log.read_text().splitlines() if "trl" in line]
    assert [line.split(" ")[0] for line in steps] == [f"s:{step}" for step in range(60)]
    llmc.load_model(tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 2


TORCHRUN = {"NODES": "1", "RENDEZVOUS": "localhost:0", "RUN": "tiny", "RANKS_PER_NODE": "2"}


@pytest.mark.slow  # test_faults.py has torchrun's agent without the script
def test_torchrun_script_forwards_signals_and_resumes(environment, tiny, tmp_path):
    """One start ends by SIGUSR1, the next one resumes and ends by SIGTERM."""
    flags = tiny | {"--num_iterations": "1000", "--zero_stage": "3", "--output_dir": str(tmp_path / "run")}
    command, log = [str(ROOT / "scripts" / "torchrun.sh"), *command_line(flags)], tmp_path / "run" / "main.log"
    screens = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        steps = log.read_text().count("trl") if log.exists() else 0
        started = subprocess.Popen(
            command, env=environment | TORCHRUN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for_step(log, steps + 5)
        started.send_signal(number)
        screen, errors = started.communicate(timeout=90)
        assert started.returncode == 1 and "SignalException" in errors  # torchrun's own
        assert "stopped by SIGTERM, SIGUSR1 or SIGHUP after step" in screen
        screens.append(screen)
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda folder: int(folder.name[5:]))
    assert len(saved) == 2 and f"resumed from {saved[0]}" in screens[1]
    assert "2 ranks × 1 micro-steps" in screens[0]


@pytest.mark.parametrize("name", ["NODES", "RENDEZVOUS", "RUN"])
def test_torchrun_script_names_what_it_lacks(environment, name):
    left_out = {key: value for key, value in (environment | TORCHRUN).items() if key != name}
    done = subprocess.run([ROOT / "scripts" / "torchrun.sh"], env=left_out, capture_output=True, text=True)
    assert done.returncode != 0 and name in done.stderr
