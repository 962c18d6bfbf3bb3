"""The arithmetic of `benchmarks.scaling`, worked out by hand; and one measured row."""

import pytest

from benchmarks.scaling import measure, report, slope, traffic


def row(batch, **changes):
    values = dict(network="resnet18", variant="joint", batch=batch, seconds=0.5 * batch, peak_mb=1000 + 250 * batch,
                  saved_mb=100 * batch, parameters=2_000_000, norm_channels=1000, norms=10, gmacs=30 * batch,
                  precision="bf16", device="cpu", threads=2, versions={"torch": "2.15.0"})  # fmt: skip
    return values | changes


def test_the_slope_is_what_one_more_image_adds():
    rows = [row(1), row(4), row(8)]
    assert [slope(rows, name) for name in ("peak_mb", "saved_mb", "seconds")] == pytest.approx([250, 100, 0.5])


def test_what_a_gpu_sends():
    gradients, statistics = traffic(row(1), gpus=8)
    assert gradients == pytest.approx(4 * 2 * 7 / 8 * 2.0)  # a ring: 2 (N - 1) / N of all numbers
    # to each of 7 others 2 x 1000 moments and 10 counts; then 2 x 1000 sums around the ring
    assert statistics == pytest.approx(4 * (7 * 2010 + 1.75 * 2000) / 1e6)


def test_the_report_does_the_arithmetic():
    text = report([row(1), row(8)], memory_gb=81.0, rates=[100])
    assert "| resnet18 | joint | 250 | 100 | 0.50 | 320 |" in text  # (81,000 - 1,000) / 250
    hours = 1_281_167 * 100 / 100 / 3600
    assert f"| 100 | {hours:.0f} | {hours / 8:.0f} | {hours / 64:.0f} |" in text.replace(",", "")
    assert "| resnet18 | joint | 2.0 | 14.0 + 0.1 | 15.8 + 0.5 |" in text


@pytest.mark.slow
def test_a_row_is_measured():
    found = measure("resnet18", "joint", 1, "fp32", "cpu", 1)
    # the twin has the parameters of timm's ResNet-18, an adapter C x C weights and a norm, C = 64, 128, 256
    adapters = found["parameters"] - 11_689_512
    assert adapters == sum(c * c + 2 * c for c in (64, 128, 256))
    assert found["seconds"] > 0 and found["peak_mb"] > found["saved_mb"] > 1
