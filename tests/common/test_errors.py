"""What an error becomes: one line where the machine is to blame, and a traceback where the program is."""

import errno
import os
import re
import subprocess
import sys

import pytest
from support import BUNDLED, PROJECT, call_here

from grath.common.errors import explain_system_error


def cuda_error(number, text):
    import torch

    error = torch.AcceleratorError(text)
    error.error_code = number
    return error


def out_of_memory():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def of_rust(number):
    from safetensors import SafetensorError

    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


def raised_from(cause):
    """What a library makes of a system error: one of its own, explicitly raised from it."""
    try:
        raise ValueError("an error occurred while generating the dataset") from cause
    except ValueError as error:
        return error


MACHINES = {
    "GPU memory": (out_of_memory, "the memory is full: use a smaller"),
    "GPU memory, by CUDA": (lambda: cuda_error(2, "CUDA error: out of memory"), "the memory is full: use a smaller"),
    "main memory, by torch": (
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        "the memory is full: use a",
    ),
    "GPU memory, by cuBLAS": (
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "the memory is full: use a smaller",
    ),
    "main memory": (MemoryError, "the memory is full: use a smaller --batch_size"),
    "no such GPU": (
        lambda: cuda_error(101, "CUDA error: invalid device ordinal"),
        "the GPU cannot be used: check nvidia-smi",
    ),
    "no GPU": (lambda: RuntimeError("No CUDA GPUs are available"), "the GPU cannot be used: check nvidia-smi"),
    "disk": (lambda: OSError(errno.ENOSPC, "full"), "no space is left on the disk: free some"),
    "quota": (lambda: OSError(errno.EDQUOT, "quota"), "no space is left on the disk: free some"),
    "disk, in Rust": (lambda: of_rust(errno.ENOSPC), "no space is left on the disk: free some"),
    "disk, by torch": (lambda: RuntimeError("PytorchStreamWriter failed writing"), "no space is left on the disk"),
    "read-only": (lambda: OSError(errno.EROFS, "x"), "the file system is read-only: choose another output folder"),
    "rights": (lambda: PermissionError(errno.EACCES, "x"), "permission denied: choose another folder"),
    "a package": (
        lambda: ModuleNotFoundError("No module named 'peft'", name="peft"),
        "pip install -e . -c constraints.txt",
    ),
    "descriptors": (lambda: OSError(errno.EMFILE, "x"), "too many files are open: raise the limit (ulimit -n 4096)"),
    "below a library": (lambda: raised_from(OSError(errno.ENOSPC, "x")), "no space is left on the disk: free some"),
}


def ask(tmp_path, model, error, monkeypatch):
    """The arguments of a stage whose model cannot be loaded for an error."""
    from grath.generation import select

    def fail(*arguments):
        raise error

    monkeypatch.setattr(select, "load_for_inference", fail)
    return ("--model_name_or_path", model, "--save_prefix", "x", "--save_dir", tmp_path, "--data_path", BUNDLED)


@pytest.mark.parametrize("kind", MACHINES)
def test_trouble_with_the_machine_is_one_line(kind, tiny_llama, tmp_path, monkeypatch):
    make, line = MACHINES[kind]
    flags = ask(tmp_path, tiny_llama, make(), monkeypatch)
    done = call_here("create_pair_responses.py", *flags, status=1)
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def while_handling(error, other, hidden):
    """`other`, raised while `error` is handled; with its context hidden, as `raise ... from None` does."""
    try:
        try:
            raise error
        except type(error):
            if hidden:
                raise other from None
            raise other  # noqa: B904 (what is tested)
    except type(other) as raised:
        return raised


BUGS = {
    "of ours": lambda: ZeroDivisionError("x"),
    "on a GPU": lambda: cuda_error(710, "CUDA error: device-side assert triggered"),
    "hidden context": lambda: while_handling(ModuleNotFoundError("peft", name="peft"), ValueError("x"), True),
    "other context": lambda: while_handling(PermissionError(errno.EACCES, "x"), KeyError("x"), False),
    "that speaks of memory": lambda: KeyError("No space left on device"),
    "a module of ours": lambda: ModuleNotFoundError("No module named 'grath.x'", name="grath.x"),
    "a file that is not there": lambda: FileNotFoundError(errno.ENOENT, "x"),
}


@pytest.mark.parametrize("kind", BUGS)
def test_any_other_error_keeps_its_traceback(kind, tiny_llama, tmp_path, monkeypatch):
    import create_pair_responses

    error = BUGS[kind]()
    assert explain_system_error(error) is None
    flags = ask(tmp_path, tiny_llama, error, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["x", *map(str, flags)])
    with pytest.raises(type(error)):
        create_pair_responses.run_main(create_pair_responses.main)


def test_a_debugger_sees_every_traceback(tmp_path):
    flags = ("--model_name_or_path", tmp_path, "--save_prefix", "x", "--save_dir", tmp_path, "--data_path", BUNDLED)
    for debug in ("0", "1"):
        done = call_here("create_pair_responses.py", *flags, env={"GRATH_DEBUG": debug}, status=2)
        assert ("Traceback (most recent call last)" in done.stderr) == (debug == "1")
        assert done.stderr.splitlines()[-1].startswith("create_pair_responses.py: error: ")


def test_a_missing_package_is_one_line_at_the_command_line(tmp_path):
    command = [sys.executable, "-S", PROJECT / "create_pair_responses.py", "--model_name_or_path", "m"]
    command += ["--save_prefix", "x", "--save_dir", tmp_path, "--data_path", BUNDLED]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert re.search(r"No module named '\w+': pip install -e \. -c constraints\.txt\n$", done.stderr)
    assert done.stderr.count("\n") == 1
