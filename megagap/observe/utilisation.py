"""How much of the hardware's peak a step uses (model FLOPs utilisation; Chowdhery et al. 2022, appendix B)."""

import torch

# Dense bf16 peaks of data sheets in TFLOP/s, by a part of the device's name. Unknown devices have no entry: a guessed
# peak would make a wrong MFU look right.
_PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "MI250X": 191.5,  # a die, which is what a rank has; 383 for the package
    "MI300X": 1307.0,
}


def peak_tflops(device: torch.device) -> float | None:
    """Data-sheet peak for dense bf16 matrix products, or None if the device is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most device memory allocated so far; on CPU the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
