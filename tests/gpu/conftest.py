"""The device of each test, and the table that `make gpu-test` prints."""

import pytest
import torch

from grath.run.check import driver_cuda_version


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """`cpu` or `cuda`, also for the commands that a test starts. `cuda` is skipped where torch sees no GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    monkeypatch.setenv("DEVICE", "" if request.param == "cuda" else "cpu")
    return request.param


def pytest_terminal_summary(terminalreporter):
    """Print each test that ran on a GPU, with its outcome."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    calls = [report for report in reports if report.when == "call" and "tests/gpu/" in report.nodeid]
    if not (on_gpu := [report for report in calls if "[cpu" not in report.nodeid]):
        return
    name, driver = torch.cuda.get_device_name(0), driver_cuda_version()
    terminalreporter.write_line(f"\n| {name}, torch {torch.__version__}, driver for CUDA {driver} | |\n| --- | --- |")
    for report in on_gpu:
        test = report.nodeid.split("::")[1]
        terminalreporter.write_line(f"| {test} | {report.outcome}, {report.duration:.1f} s |")
