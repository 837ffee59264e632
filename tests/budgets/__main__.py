"""`python -m tests.budgets` prints all that is counted without a GPU, and writes a table of README; `python -m
tests.budgets memory` writes README's table of memory by model and batch, in about a minute."""

import argparse

from bench.results import ROOT
from bench.tables import put_table
from kernels import interpreter

COMMAND = "python -m tests.budgets"


def main() -> int:
    """Return 1 where a limit on resources is broken."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("what", nargs="?", choices=["memory"])
    what = parser.parse_args().what
    interpreter.choose("cuda")
    from tests.budgets import resources, step

    if what == "memory":
        counted = {preset: step.count_memory(preset) for preset in ("d12", "d24", "d36", "d48")}
        put_table(step.memory_table(counted), ROOT / "README.md", f"{COMMAND} memory")
        return 0
    steps = step.count_steps()
    print(f"kernel launches of a training step: {step.TITLE}\n{step.launches_table(steps)}\n")
    print(f"saved activations per token and layer of {step.PRESET}\n{step.saved_table()}\n")
    found = resources.compile_all()
    violations = resources.violations([r for r in found if r.call == step.PRESET])
    print(f"kernels of that step, compiled\n{resources.resources_table(found)}\n")
    print("\n".join(violations or ["nothing spills; shared memory and matrix instructions are as they should be"]))
    print(f"\n{step.summary(steps)}")
    put_table(step.summary(steps, markdown=True), ROOT / "README.md", COMMAND)
    return 1 if violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
