"""What an error becomes: one line where the machine is to blame, and a traceback where the program is."""

import errno
import logging
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from support import PROJECT, asking, call, call_here

from grath.common.errors import run_main


def cuda_error(number, text):
    error = torch.AcceleratorError(text)
    error.error_code = number
    return error


def after(error, link):
    """An error that a library raises from another ("__cause__"), or while it handles another ("__context__")."""
    raised = ValueError("an error occurred while generating the dataset")
    setattr(raised, link, error)
    return raised


MEMORY = "the memory is full: use a smaller --batch_size"
DISK = "no space is left on the disk: free some"
GPU = "the GPU cannot be used: check nvidia-smi"
MACHINES = {
    "GPU memory": (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MEMORY),
    "GPU memory, by CUDA": (lambda: cuda_error(2, "CUDA error: out of memory"), MEMORY),
    "GPU memory, by cuBLAS": (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), MEMORY),
    "main memory": (MemoryError, MEMORY),
    "main memory, by torch": (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MEMORY),
    "no such GPU": (lambda: cuda_error(101, "CUDA error: invalid device ordinal"), GPU),
    "no GPU": (lambda: RuntimeError("No CUDA GPUs are available"), GPU),
    "disk": (lambda: OSError(errno.ENOSPC, "full"), DISK),
    "quota": (lambda: OSError(errno.EDQUOT, "quota"), DISK),
    "disk, in Rust": (lambda: SafetensorError("I/O error: No space left on device (os error 28)"), DISK),
    "disk, by torch": (lambda: RuntimeError("PytorchStreamWriter failed writing"), DISK),
    "disk, below a library": (lambda: after(OSError(errno.ENOSPC, "x"), "__cause__"), DISK),
    "read-only": (lambda: OSError(errno.EROFS, "x"), "the file system is read-only: choose another output folder"),
    "rights": (lambda: PermissionError(errno.EACCES, "x"), "permission denied: choose another folder"),
    "a package": (lambda: ModuleNotFoundError("no peft", name="peft"), "pip install -e . -c constraints.txt"),
    "descriptors": (lambda: OSError(errno.EMFILE, "x"), "too many files are open: raise the limit (ulimit -n 4096)"),
}


@pytest.mark.parametrize("kind", MACHINES)
def test_trouble_with_the_machine_is_one_line(kind, capsys):
    make, line = MACHINES[kind]
    with pytest.raises(SystemExit, match="^1$"):
        run_main(Mock(side_effect=make()))
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


BUGS = {
    "of ours": lambda: ZeroDivisionError("x"),
    "on a GPU": lambda: cuda_error(710, "CUDA error: device-side assert triggered"),
    "while another is handled": lambda: after(PermissionError(errno.EACCES, "x"), "__context__"),
    "that speaks of memory": lambda: KeyError("No space left on device"),
    "a module of ours": lambda: ModuleNotFoundError("No module named 'grath.x'", name="grath.x"),
    "a file that is not there": lambda: FileNotFoundError(errno.ENOENT, "x"),
}


@pytest.mark.parametrize("kind", BUGS)
def test_any_other_error_keeps_its_traceback(kind):
    error = BUGS[kind]()
    with pytest.raises(type(error)):
        run_main(Mock(side_effect=error))


def test_the_text_of_a_file_in_a_librarys_warning_is_escaped(caplog):
    library = logging.getLogger("a library")
    with pytest.raises(SystemExit, match="^0$"):
        run_main(lambda: library.warning("the type %s", "\x1b[2Jx"))
    assert [record.getMessage() for record in caplog.records] == ["the type \\x1b[2Jx"]
    with pytest.raises(TypeError), caplog.at_level(logging.ERROR, "a library"):
        run_main(lambda: library.error("no place for this", 1))


def test_a_debugger_sees_every_traceback(tmp_path):
    for debug in ("0", "1"):
        done = call_here(*asking(tmp_path, tmp_path), env={"GRATH_DEBUG": debug}, status=2)
        assert ("Traceback (most recent call last)" in done.stderr) == (debug == "1")
        assert done.stderr.splitlines()[-1].startswith("create_pair_responses.py: error: ")


def test_a_missing_package_is_one_line_at_the_command_line(tmp_path):
    command = [sys.executable, "-S", *map(str, asking("m", tmp_path))]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=env)
    assert done.returncode == 1
    assert re.fullmatch(r".*No module named '\w+': pip install -e \. -c constraints\.txt\n", done.stderr)


def test_a_signal_ends_the_processes_of_a_pool():
    """They are forked, and would raise it as an exception."""
    code = (
        "import os, signal\nfrom grath.common.errors import run_main\n"
        "def main():\n    if (child := os.fork()) == 0:\n"
        "        os._exit(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)\n"
        "    return 1 - os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\nrun_main(main)\n"
    )
    call(sys.executable, "-c", code)
