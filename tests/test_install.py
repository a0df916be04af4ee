"""Installation: the pinned packages, and their constraints."""

import re
import tomllib

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


def test_every_package_is_installed():
    """Of an editable installation, a package that is not listed can be imported all the same."""
    options = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(PROJECT) for path in (PROJECT / "grath").rglob("*.py")}
    assert sorted(options["packages"]) == sorted(".".join(folder.parts) for folder in folders)
    assert options["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
