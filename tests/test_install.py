"""Installation: the pinned packages, and their constraints."""

import re
import shutil
import subprocess
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import PROJECT


def lines(name):
    text = (PROJECT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith(("#", "-r"))]


def test_the_constraints_name_every_package_that_is_needed():
    constraints = [Requirement(line) for line in lines("constraints.txt")]
    here = {
        canonicalize_name(found.name): found.specifier
        for found in constraints
        if not found.marker or found.marker.evaluate()
    }
    pinned = [Requirement(line) for name in ("requirements.txt", "requirements-dev.txt") for line in lines(name)]
    assert len(pinned) > 12
    for wanted in pinned:
        if not wanted.marker or wanted.marker.evaluate():
            assert here[canonicalize_name(wanted.name)] == wanted.specifier, wanted


def test_every_installation_is_by_the_constraints():
    assert re.search(r"^PIP := .* -c constraints.txt$", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    texts = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("*.sh"), *PROJECT.glob("grath/**/*.py")]
    found = [
        (path.name, command)
        for path in texts
        for command in re.findall(r"pip install (?:-e|-r)[^\n`\\\"]*", path.read_text(encoding="utf-8"))
    ]
    assert len(found) > 3
    assert [one for one in found if not one[1].startswith("pip install -e . -c constraints.txt")] == []


def test_the_project_can_be_installed(tmp_path):
    """As `pip install .` builds it, but without fetching the build's own packages."""
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(PROJECT / "grath", copy / "grath", ignore=shutil.ignore_patterns("__pycache__"))
    for path in PROJECT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([*command, tmp_path / "site", wheel], check=True)
    installed = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site" / "grath").rglob("*.py")}
    assert installed == {path.relative_to(PROJECT) for path in (PROJECT / "grath").rglob("*.py")}
    metadata = next((tmp_path / "site").glob("grath-*/METADATA")).read_text()
    assert all(f"Requires-Dist: {line.split('==')[0]}" in metadata for line in lines("requirements.txt"))
