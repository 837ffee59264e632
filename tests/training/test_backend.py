"""What a run sets up of its machine."""

import sys

import pytest
import torch

from training import backend


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept_for_the_next_step():
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB, 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    backend.keep_freed_memory()
    per_round = [faults() for _ in range(30)]
    assert sum(per_round[-10:]) < 1000, per_round  # glibc before 2.38 needs some rounds to use a freed tensor again
