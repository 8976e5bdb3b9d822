"""What NVML's bits mean, and that a machine without a GPU is no error."""

import pytest
import torch

from chipdeploy.latency.gpu import GpuWatch, slowdowns


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0, []),
        (0x1, []),  # idle
        (0x2 | 0x100, []),  # clocks that somebody set
        (0x4, ["power cap"]),
        (0x1 | 0x20 | 0x40, ["software thermal slowdown", "hardware thermal slowdown"]),
        (0x8 | 0x10 | 0x80, ["hardware slowdown", "sync boost", "hardware power brake"]),
    ],
)
def test_slowdowns_are_told_from_other_reasons(bits, names):
    assert slowdowns(bits) == names


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_there_is_nothing_to_watch():
    assert GpuWatch.open() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_gpu_tells_what_it_does():
    facts = GpuWatch.open().facts()
    assert facts["name"]
    assert facts["sm_mhz"] > 0
    assert facts["temperature_c"] > 0
