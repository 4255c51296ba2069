"""The figures of devices, and what they make of an operation."""

from dataclasses import replace

import pytest
import torch

from megagap.observe.utilisation import peak_tflops
from megagap.planning.devices import DTYPES, known_devices, load_device
from megagap.planning.recording import Operation, Work
from megagap.planning.roofline import cost

H100 = load_device("h100")


def operation(bytes: int = 0, work: Work | None = None, kind: str = "other", ranks: tuple[int, ...] = ()) -> Operation:
    return Operation(kind, "x", "ops/x.py:1", frozenset(), "", 1, bytes, work or Work(torch.bfloat16), ranks=ranks)


def busy(given: Operation) -> float:
    return cost(given, replace(H100, launch_us=0.0)).seconds


@pytest.mark.parametrize("key", known_devices())
def test_every_device_states_its_sources_and_rates_that_do_not_exceed_its_peaks(key):
    device = load_device(key)
    assert device.sources
    for dtype, peak in device.peak_tflops.items():
        assert max(rate for _, rate in device.product_tflops[dtype]) < peak
        for by_dtype in device.attention_tflops.values():
            for rates in by_dtype.get(dtype, {}).values():
                assert max(rates) < peak
    for steps in device.product_tflops.values():
        assert steps == sorted(steps) and [rate for _, rate in steps] == sorted(rate for _, rate in steps)


@pytest.mark.parametrize("key", [key for key in known_devices() if key != "cpu"])
def test_peaks_are_those_that_training_measures_its_mfu_against(key, monkeypatch):
    device = load_device(key)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: f"AMD or NVIDIA {device.name} something")
    for dtype in (torch.bfloat16, torch.float32):
        assert device.peak_tflops[DTYPES[dtype]] == peak_tflops(torch.device("cuda", 0), dtype)


def test_an_operation_takes_the_slower_of_its_arithmetic_and_its_traffic():
    product = Work(torch.bfloat16, flops=2 * 4096**3, product=(4096, 4096, 4096))
    assert busy(operation(3 * 2 * 4096**2, product)) == pytest.approx(2 * 4096**3 / 720e12)
    assert busy(operation(10**12, product)) == pytest.approx(1 / H100.bandwidth_tb)


@pytest.mark.parametrize(("smallest", "rate"), [(128, 545 / 4), (512, 545), (767, 545), (1024, 640), (10**6, 720)])
def test_products_with_a_small_dimension_are_slower(smallest, rate):
    assert H100.product_rate(torch.bfloat16, smallest) == pytest.approx(rate * 1e12)


@pytest.mark.parametrize(("head", "rate"), [(32, 203), (64, 406), (96, 406), (128, 548), (256, 548)])
def test_attention_has_the_rate_of_the_measured_head_size_below(head, rate):
    assert H100.attention_rate("cudnn", torch.bfloat16, head, backward=False) == pytest.approx(rate * 1e12)


@pytest.mark.parametrize(
    ("ranks", "gb"),
    [
        (range(8), H100.link_gb),
        ((0, 8), H100.network_gb),
        (range(16), min(H100.link_gb, 8 * H100.network_gb)),
        ((0, 1, 8, 9), 2 * H100.network_gb),
    ],
)
def test_collectives_beyond_a_node_share_its_devices_networks(ranks, gb):
    assert busy(operation(10**9, kind="collectives", ranks=tuple(ranks))) == pytest.approx(1 / gb)


def test_other_rates_can_be_assumed():
    other = H100.with_rates(640, 2.7)
    assert other.product_rate(torch.bfloat16, 4096) == 640e12 and other.bandwidth_tb == 2.7
    assert other.product_rate(torch.bfloat16, 512) == pytest.approx(545e12 * 640 / 720)
    assert H100.with_rates(None, None) == H100
