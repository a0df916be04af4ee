"""The layout: packages whose imports go one way, and scripts that nothing imports."""

import ast

import pytest
from support import PROJECT

# A package may import those of a lower number.
ORDER = {
    "common": 0, "modeling": 1, "pairs": 2, "serving": 2, "generation": 3, "dpo": 4, "evaluation": 4, "run": 5,
    "report": 5,
}  # fmt: skip
COMMANDS = ("grath.distance", "grath.export", "grath.push")
MODULES = sorted(path for path in (PROJECT / "grath").rglob("*.py") if path.name != "__init__.py")
SCRIPTS = {path.stem for path in PROJECT.glob("*.py")}


def name_of(path):
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts)


def imports_of(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names} & {name_of(other) for other in MODULES}
            yield from names or {node.module}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    own = name.split(".")[1]
    for imported in imports_of(path):
        assert imported.split(".")[0] not in SCRIPTS, f"{name} imports the script {imported}"
        if imported.startswith("grath.") and name not in COMMANDS:
            other = imported.split(".")[1]
            assert other == own or ORDER[other] < ORDER[own], f"{name} imports {imported}"


def test_the_readme_is_one_page():
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
