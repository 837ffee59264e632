"""What the tests of budgets share: a process that compiles, and the traced steps."""

import json
import os
import subprocess
import sys

import pytest

from bench.machine_code import MachineCode
from tests.budgets import step
from tests.budgets.resources import Resources
from tests.conftest import ROOT


def compile_for(*capabilities: int) -> list[Resources]:
    """Every kernel, compiled in a process of its own: this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.budgets.resources", *map(str, capabilities)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [Resources(*fields)._replace(code=MachineCode(*fields[3])) for fields in json.loads(done.stdout)]


@pytest.fixture(scope="session")
def compiled() -> list[Resources]:
    """For sm_90; a slow test has the other chips."""
    return compile_for(90)


@pytest.fixture(scope="session")
def steps() -> dict[str, step.Counted]:
    """A training step by backend."""
    return step.count_steps()
