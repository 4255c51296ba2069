"""The peaks that MFU is measured against."""

import tomllib
from pathlib import Path

import pytest
import torch

from megagap.observe import utilisation
from megagap.observe.utilisation import data_sheet_peaks, peak_tflops

# What torch.cuda.get_device_name says, and TFLOP/s in bf16 and fp32 of the data sheets.
KNOWN = {
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA H100 80GB HBM3": (989, 66.9),
    "NVIDIA H100 PCIe": (756, 51.2),
    "NVIDIA H100 NVL": (835, 60),
    "NVIDIA H200": (989, 66.9),
    "NVIDIA H200 NVL": (835, 60),
    "NVIDIA GH200 480GB": (989, 66.9),
    "NVIDIA B200": (2250, 75),
    "NVIDIA GB200": (2500, 80),
    "NVIDIA B300 SXM6 AC": (2250, 75),
    "NVIDIA GB300": (2500, 83),
    "AMD Instinct MI250": (181.05, 45.25),
    "AMD Instinct MI250X": (191.5, 47.85),
    "AMD Instinct MI300A": (980.6, 122.6),
    "AMD Instinct MI300X": (1307.4, 163.4),
    "AMD Instinct MI325X": (1307.4, 163.4),
    "AMD Instinct MI350X": (2306.9, 144.2),
    "AMD Instinct MI355X": (2516.6, 157.3),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_peak_is_that_of_the_device_and_of_the_dtype(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu, (bf16, fp32) = torch.device("cuda", 0), KNOWN[name]
    assert peak_tflops(gpu, torch.bfloat16) == peak_tflops(gpu, torch.float16) == bf16
    assert peak_tflops(gpu, torch.float32) == fp32
    assert peak_tflops(gpu, torch.float64) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA L40S",
        "NVIDIA RTX PRO 6000 Blackwell",
        "AMD Instinct MI308X",
        "AMD Instinct MI100",
        "",
    ],
)
def test_the_peak_of_an_unknown_device_or_of_a_part_of_one_is_not_guessed(name):
    assert data_sheet_peaks(name) == {}


def test_a_cpu_has_no_peak_of_a_data_sheet():
    assert peak_tflops(torch.device("cpu"), torch.float32) is None


def test_every_peak_names_its_source():
    entries = tomllib.loads(Path(utilisation.__file__).with_name("peaks.toml").read_text())
    for key, entry in entries.items():
        assert entry.keys() == {"bf16", "fp32", "source"} and key.split()[0] in entry["source"], key
        assert entry["fp32"] < entry["bf16"], key
