import pytest
import torch

from megagap.ops import compiled


@pytest.fixture
def gpu() -> torch.device:
    """NVIDIA's or AMD's: torch calls both CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(gpu: torch.device) -> torch.device:
    """A GPU that the kernels were built for."""
    if not compiled.AVAILABLE:
        pytest.skip("the compiled kernels were not built")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("megagap::rms_norm", "CUDA"):
        pytest.fail("there is a GPU, but megagap._C was built without kernels for it: see docs/gpu_kernels.md")
    return gpu
