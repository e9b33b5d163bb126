"""The order of the house: imports go down, randomness has one door, help is quick."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tuner"
MODULES = sorted(PACKAGE.rglob("*.py"))
# A module or package imports only from lines above its own; files of a package know each other.
# The package itself stands on top with its version; ``__getattr__`` there is the public door.
LEVELS = """
errors __init__
packages
registry stores urls alone pools placing slots kept
seeding imbalance metrics checkpoint chunks speeds_file
losses samplers datasets models augment optim schedules strengths statistics
training entries pruning compiled posthoc rows twins fused
recipe
lane_state lane_logits
lane loaded describe space evaluation sections
stacks
steps
heads contest
ladder
study trainer engines search artifacts backends
remote
storage
ledger
proxy
fit pulse shares ended plain
planned
climbing held
confirm
rounds
tickets
session
trained proposals doubts
confirmation
goals rungs verdict report card
worker export web
probe
supervisor doctor
launch
cli
__main__
"""
LEVEL = {name: i for i, line in enumerate(LEVELS.split("\n")) for name in line.split()}
PARTS = ("losses", "samplers", "models", "datasets", "augment")
LIBRARIES_FOR_LATER = {"boto3", "botocore", "imblearn", "optuna_dashboard", "scipy", "sklearn"}
LIBRARIES_FOR_LATER |= {"llvmlite", "numba", "ray", "submitit", "timm", "torchvision", "waitress"}
KERNELS = {"fused/_kernels.py": {"llvmlite", "numba"}}
"""What is made of a library as it is imported: it is imported late as a whole."""
LARGE = LIBRARIES_FOR_LATER | {"grpc", "numpy", "optuna", "plotly", "torch"}
SEEDING = {"random.seed", "np.random.seed", "numpy.random.seed", "torch.seed", "torch.manual_seed"}
SEEDING |= {"torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.random.manual_seed"}
SEEDING |= {"torch.set_rng_state", "torch.cuda.set_rng_state"}
DRAWING = {"bernoulli", "multinomial", "normal", "rand", "randint", "randn", "randperm"}


def label(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """Name of a file's module or package right below ``tuner``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all but what is only there for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from executed(child)


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_import(child)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names that import statements bring in."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(executed(tree_of(path)))]
    inner = [steps[1] for steps in names if steps[0] == "tuner" and len(steps) > 1]
    return {"__init__" if name not in LEVEL else name for name in inner}


def test_every_module_has_one_level() -> None:
    assert {room(path) for path in MODULES} == set(LEVEL)
    assert len(LEVELS.split()) == len(LEVEL)


@pytest.mark.parametrize("path", [p for p in MODULES if label(p) != "__init__.py"], ids=label)
def test_imports_go_down(path: Path) -> None:
    own = room(path)
    for name in rooms_imported(path) - {own}:
        assert LEVEL[name] < LEVEL[own], f"{own} imports {name}"


def test_package_itself_imports_nothing_before_it_is_asked() -> None:
    names = set(imported(at_import(tree_of(PACKAGE / "__init__.py"))))
    assert all(name.split(".")[0] in ("__future__", "typing") for name in names)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_module_says_what_it_is_and_fits_on_three_hundred_lines(path: Path) -> None:
    assert (ast.get_docstring(tree_of(path)) or "").strip().splitlines()
    assert path.read_text(encoding="utf-8").startswith('"""')
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_only_search_knows_optunas_samplers_and_pruners(path: Path) -> None:
    tree = tree_of(path)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= set(imported(ast.walk(tree)))
    hidden = {name for name in used if name.startswith(("optuna.samplers", "optuna.pruners"))}
    assert label(path) == "search.py" or not hidden


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_only_seeding_touches_global_random_state(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and label(path) != "seeding.py":
            name = ast.unparse(node.func)
            assert name not in SEEDING
            if name.startswith("torch.") and name.removeprefix("torch.") in DRAWING:
                assert "generator" in {keyword.arg for keyword in node.keywords}, name
            if name.startswith(("np.random.", "numpy.random.")):
                assert "default_rng" in name, name


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_large_libraries_are_imported_where_they_are_used(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(at_import(tree_of(path)))}
    assert not roots & (LIBRARIES_FOR_LATER - KERNELS.get(label(path), set()))


@pytest.mark.parametrize("part", PARTS)
def test_every_file_of_a_part_is_imported_by_its_package(part: str) -> None:
    """Else its components would be missing from the registry."""
    files = {path.stem: path for path in (PACKAGE / part).glob("*.py")}
    reached, waiting = set(), ["__init__"]
    while waiting:
        stem = waiting.pop()
        reached.add(stem)
        names = [name.split(".") for name in imported(at_import(tree_of(files[stem])))]
        inner = {steps[2] for steps in names if steps[:2] == ["tuner", part] and len(steps) > 2}
        waiting += [name for name in inner & set(files) if name not in reached]
    assert reached == set(files)


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after running ``code``."""
    report = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_help_of_every_command_loads_no_large_library() -> None:
    loaded = modules_after(
        "from typer.testing import CliRunner\n"
        "from tuner.cli import app, fleet, launch, make, read, run, service, slot, trials, work\n"
        "help = CliRunner().invoke(app, ['--help'])\n"
        "assert help.exit_code == 0 and 'dashboard' in help.output, help.output\n"
        "for command in app.registered_commands:\n"
        "    name = command.name or command.callback.__name__\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0, name\n"
        "for name in ('ray', 'slurm'):\n"
        "    assert CliRunner().invoke(app, ['launch', name, '--help']).exit_code == 0, name\n"
    )
    assert "tuner" in loaded
    assert not loaded & LARGE


def test_importing_the_package_loads_no_large_library() -> None:
    loaded = modules_after("import tuner; tuner.__version__")
    assert not loaded & (LARGE | {"pydantic"})
