"""The device of each test, and the table that `make gpu-test` prints."""

import pytest

MEASURED = pytest.StashKey()


def pytest_configure(config):
    config.stash[MEASURED] = []


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """`cpu` or `cuda`, also for the commands that a test starts. `cuda` is skipped where torch sees no GPU."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    monkeypatch.setenv("DEVICE", "" if request.param == "cuda" else "cpu")
    return request.param


@pytest.fixture
def measured(request):
    """A list of (what, value) to which a test appends what it measures."""
    return request.config.stash[MEASURED]


def pytest_terminal_summary(terminalreporter, config):
    import torch

    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    calls = [report for report in reports if report.when == "call" and "tests/gpu/" in report.nodeid]
    on_gpu = [report for report in calls if "[cpu" not in report.nodeid]
    if not on_gpu:
        return
    from grath.pipeline.machine import driver_cuda_version

    name, driver = torch.cuda.get_device_name(0), driver_cuda_version()
    terminalreporter.write_line(f"\n| {name}, torch {torch.__version__}, driver for CUDA {driver} | |")
    terminalreporter.write_line("| --- | --- |")
    for report in on_gpu:
        terminalreporter.write_line(f"| {report.nodeid.split('::')[1]} | {report.outcome}, {report.duration:.1f} s |")
    for what, value in config.stash[MEASURED]:
        terminalreporter.write_line(f"| {what} | {value} |")
