import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from megagap.process.allocator import keep_freed_memory
torch.set_num_threads(1)
told = keep_freed_memory() if sys.argv[1] == "kept" else True

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def temporaries():
    x = torch.ones(12_000_000)  # 48 MB: glibc maps blocks above 32 MiB
    for _ in range(4):
        x = x + 1

for _ in range(5):  # until the heap has grown to what they need
    temporaries()
counts = []
for _ in range(10):  # the system may take pages away or move them at any time, which is no doing of the allocator
    before = faults()
    temporaries()
    counts.append(faults() - before)
print(told, min(counts))
"""


def test_large_temporaries_are_not_faulted_in_again():
    faults = {}
    for choice in ("kept", "default"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, check=True)
        told, count = done.stdout.split()
        if told == "False":
            pytest.skip("the C library has no mallopt")
        faults[choice] = int(count)
    assert 10 * faults["kept"] < faults["default"], "or has the default changed: is the cure still needed?"
