import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from mythos.distributed.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step():
    held = [torch.ones(40 * 2**18), torch.ones(2**20)]  # 40 and 4 MiB: above and below what glibc ever maps by itself
    del held

for _ in range(10):
    step()  # until the blocks have found their places
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_steps_meet_the_memory_of_the_step_before():
    faults = {
        how: int(
            subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("keep", "default")
    }
    pages = 5 * 44 * 2**20 // 4096
    assert faults["default"] > pages / 2  # else there is nothing to keep
    assert faults["keep"] < pages / 50
