"""The writers of files and folders: against planted names, leftovers, mount points and neighbours."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common
from common import BadInput, atomic_folder, atomic_write
from tests.conftest import ROOT


def fill(path: Path, **options) -> None:
    with atomic_folder(path, **options) as folder:
        (folder / "train_000000.bin").write_bytes(b"train")
        (folder / "val_000000.bin").write_bytes(b"val")


def modes(*paths: Path) -> list[str]:
    return [oct(path.stat().st_mode & 0o777) for path in paths]


def test_temporary_names_are_neither_guessed_nor_followed_nor_removed(tmp_path, monkeypatch):
    """A link waits where the process number or a guess would lead."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    planted = [tmp_path / f".file.{os.getpid()}.part", tmp_path / ".file.guessed.part"]
    for link in planted:
        link.symlink_to(victim)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"theirs")
    assert (tmp_path / "file").read_bytes() == b"theirs" and victim.read_bytes() == b"mine"
    monkeypatch.setattr(common.secrets, "token_hex", lambda n: "guessed")
    with pytest.raises(BadInput, match=r"cannot write .*file: File exists"), atomic_write(tmp_path / "file") as file:
        file.write(b"once more")
    assert victim.read_bytes() == b"mine" and all(link.is_symlink() for link in planted)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["file", "victim", *(link.name for link in planted)]
    )


def test_permissions_are_those_of_a_plain_open(tmp_path):
    (tmp_path / "old").mkdir(mode=0o750)
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file"):
            pass
        for name in ("new", "old"):
            with atomic_folder(tmp_path / name) as folder:
                assert modes(folder.parent) == ["0o700"]  # nobody can plant anything meanwhile
                (folder / "x").touch()
    finally:
        os.umask(before)
    assert modes(tmp_path / "file", tmp_path / "new" / "x", tmp_path / "old" / "x") == ["0o640"] * 3
    assert modes(tmp_path / "new", tmp_path / "old") == ["0o750"] * 2


def test_leftovers_and_what_others_made_stay_and_are_not_in_the_way(tmp_path):
    others = [tmp_path / f".out.{os.getpid()}.part", tmp_path / "out" / ".out.killed.part"]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / "precious").touch()
    (tmp_path / "out" / "lost+found").mkdir()  # as on a disk of its own
    fill(tmp_path / "out")
    assert all((folder / "precious").exists() for folder in others)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("train_000000.bin", "val_000000.bin", "lost+found", ".out.killed.part")
    }
    with pytest.raises(BadInput, match="is not empty"):
        fill(tmp_path / "out")


def test_an_empty_folder_is_filled_by_one_process_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
        with pytest.raises(BadInput, match=f"--output_dir {tmp_path / 'out'}: another run writes to it"):
            fill(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_an_empty_folder_gets_everything_or_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    there = pytest.raises(BadInput, match=r"train_000000\.bin is there already")
    with there, atomic_folder(tmp_path / "out") as folder:
        for name in ("val_000000.bin", "train_000000.bin"):
            (folder / name).write_bytes(b"ours")
        (tmp_path / "out" / "train_000000.bin").write_bytes(b"theirs")  # by one that does not ask who holds it
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [
        ("train_000000.bin", b"theirs")
    ]


def test_resumable_folder_that_others_could_write_to_is_refused(tmp_path):
    for name in ("link", "open"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "state.json").touch()
    (tmp_path / "link" / ".unfinished").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "open" / ".unfinished").mkdir()
    (tmp_path / "open" / ".unfinished").chmod(0o777)
    for name in ("link", "open"):
        with pytest.raises(BadInput, match="is no folder that only you can write to"):
            fill(tmp_path / name, state="state.json")
        assert os.path.lexists(tmp_path / name / ".unfinished")
    assert os.listdir(tmp_path / "elsewhere") == ["state.json"]


IN_MOUNTS = """
import sys
from pathlib import Path
import torch
from data import prepare
from kernels.ops import EAGER
from model import hf
from model.gpt import GPT, GPTConfig
from model.llmc import write_model
root = Path(sys.argv[1])
prepare.main(["text", str(root / "x.txt"), "--output_dir", str(root / "shards"), "--workers", "1"])
write_model(root / "model.bin", GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8), EAGER))
hf.main(["export", str(root / "model.bin"), str(root / "export")])
for folder in ("shards", "export"):
    print(*sorted(path.name for path in (root / folder).iterdir()))
"""


def can_unshare(*options: str) -> bool:
    command = ["unshare", *options, "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare("--mount"), reason="this user may not make a mount namespace")
def test_output_folders_that_are_mount_points(tmp_path):
    """As volumes of a container: prepare and export into two of them."""
    (tmp_path / "x.txt").write_text(100 * " word")
    for name in ("shards", "export"):
        (tmp_path / name).mkdir()
    mount = 'for name in shards export; do mount -t tmpfs none "$1/$name" || exit 99; done; exec "$2" -c "$3" "$1"'
    command = [
        *["unshare", "--mount", "--propagation", "private", "sh", "-c"],
        mount,
        "sh",
        tmp_path,
        sys.executable,
        IN_MOUNTS,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode == 99:
        pytest.skip("this user may not mount")
    assert done.returncode == 0, done.stderr
    shards, export = done.stdout.splitlines()[-2:]
    assert shards == "train_000000.bin val_000000.bin"
    assert export == "config.json generation_config.json model.safetensors"


START = "import os, sys; assert os.getpid() == 1; from data.prepare import main; main(sys.argv[1:])"


@pytest.mark.skipif(not can_unshare("--fork", "--pid"), reason="this user may not make a process namespace")
def test_processes_of_one_number_in_one_folder(tmp_path):
    """As in two containers. One is killed in the middle, of two that start then one wins, and each ends well."""
    output_dir = tmp_path / "out"

    def start() -> subprocess.Popen:
        """Start one that has its folder, and waits for text."""
        before = set(tmp_path.iterdir())
        command = ["unshare", "--fork", "--pid", "--kill-child", sys.executable, "-c", START, "text", "-"]
        process = subprocess.Popen(
            [*command, "--output_dir", str(output_dir), "--workers", "1"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while process.poll() is None and set(tmp_path.iterdir()) == before:
            time.sleep(0.02)
        return process

    killed = start()
    killed.kill()
    killed.communicate()
    (left,) = tmp_path.iterdir()
    first, second = start(), start()
    screen, errors = second.communicate(100 * b" word", timeout=60)
    assert second.returncode == 0 and b"91 tokens to train on" in screen, errors
    _, errors = first.communicate(100 * b" word", timeout=60)
    assert first.returncode == 2 and errors.startswith(b"data.prepare: cannot write ")
    assert len(errors.splitlines()) == 1
    assert sorted(path.name for path in output_dir.iterdir()) == ["train_000000.bin", "val_000000.bin"]
    assert set(tmp_path.iterdir()) == {left, output_dir}


def test_a_message_is_no_longer_than_a_screen():
    """What a reader of somebody else's file says may quote all of it."""
    told = str(BadInput("--resume x: " + "\x1b" * 5000 + "; name another checkpoint"))
    assert len(told) < 1700 and told.startswith("--resume x: ") and told.endswith("; name another checkpoint")


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({}, "a line\n"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "a line\n"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ""),
        ({"WORLD_SIZE": "1", "RANK": "3"}, "a line\n"),  # no rank of torchrun's: see distributed.start
        ({"WORLD_SIZE": "", "RANK": "3"}, "a line\n"),
    ],
)
def test_lines_are_printed_once_and_errors_by_every_rank(monkeypatch, capsys, environment, printed):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    common.print0("a line")
    common.print_error("a line")
    assert capsys.readouterr() == (printed, "a line\n")


CUT = """
import signal
from common import exit_on_signal

class Bar:  # as tqdm's
    def __init__(self):
        signal.raise_signal(signal.SIGINT)
        self.disable = False

    def __del__(self):
        self.disable

with exit_on_signal("prog"):
    Bar()
"""


def test_an_object_that_a_signal_cuts_in_its_constructor_says_nothing():
    done = subprocess.run([sys.executable, "-c", CUT], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "prog: stopped by SIGINT\n")
