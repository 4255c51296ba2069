"""The shim itself: what is undefined on a GPU must end a test with a message."""

import subprocess
from pathlib import Path

import pytest

from tests.ops.gpu_source.shim import compile_command

PROGRAM = """
#include "gpu/gpu_compat.h"
#include "gpu/reduce.h"

namespace megagap::gpu {
__global__ void some_wait() {
  if (threadIdx.x < 5) block_barrier();
}
__global__ void others_wait_elsewhere() {
  if (threadIdx.x < 64) {
    block_barrier();
  } else {
    block_barrier();
  }
}
__global__ void part_of_a_wave_shuffles() {
  if (threadIdx.x % 64 < 5) shuffle_xor(1.0f, 1);
}
__global__ void beyond_the_block() { shuffle_xor(1.0f, 16); }
__global__ void waves_differ(float* sums) {
  __shared__ float shared[kMaxWaves];
  if (threadIdx.x / 64 == 1) shuffle_xor(0.0f, 1);  // one wave shuffles more often than the other: no fault
  sums[threadIdx.x] = reduce_group<Sum>(static_cast<float>(threadIdx.x), 128, shared);
}
}  // namespace megagap::gpu

int main(int, char** arguments) {
  using namespace megagap::gpu;
  float sums[128];
  float* to_sums = sums;
  switch (*arguments[1]) {
    case '0': return launch(some_wait, 1, dim3(128), nullptr);
    case '1': return launch(others_wait_elsewhere, 1, dim3(128), nullptr);
    case '2': return launch(part_of_a_wave_shuffles, 1, dim3(128), nullptr);
    case '3': return launch(beyond_the_block, 1, dim3(8), nullptr);
    case '4': return launch(some_wait, 1, dim3(2048), nullptr);
    default:
      launch(waves_differ, 1, dim3(128), nullptr, to_sums);
      for (float sum : sums) {
        if (sum != 127 * 128 / 2) return 1;
      }
      return 0;
  }
}
"""
FAULTS = [
    "a barrier that not all threads of the block reach",
    "threads of a block wait at different barriers",
    "a shuffle that not all threads of a wave reach",
    "a shuffle from a thread that does not exist",
    "a launch of no or too many threads",
]


@pytest.fixture(scope="module", params=[32, 64], ids=["wave32", "wave64"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "kernels.cpp").write_text(PROGRAM)
    subprocess.run(compile_command(folder / "kernels", request.param, folder / "kernels.cpp"), check=True)
    return folder / "kernels"


@pytest.mark.parametrize(("case", "message"), list(enumerate(FAULTS)))
def test_what_a_gpu_leaves_undefined_ends_the_process_with_a_message(program: Path, case: int, message: str):
    done = subprocess.run([program, str(case)], capture_output=True, text=True)
    assert done.returncode < 0 and message in done.stderr


def test_waves_run_independently_between_barriers(program: Path):
    assert subprocess.run([program, "sound"], capture_output=True, text=True).returncode == 0
