"""The shape of the repository: who may import whom, what is never used, and that importing Raynium is cheap.

Rules are read from the syntax tree, so a forbidden import is found wherever it stands, also inside a function.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform/raynium"

# From the bottom up. A module imports from its own unit and from lower layers; units of a layer do not know each other.
# A dotted unit is a module that stands elsewhere than the folder it is in. raynium/__init__.py is above all.
LAYERS = (
    ("errors",),
    ("config",),
    ("hardware",),
    ("models", "data", "optim", "checkpoint"),
    ("planning", "accelerators"),
    ("config.rules",),  # the cross-part rules ask the planner whether a run fits
    ("engines", "convert"),
    ("rank_plan", "sampling"),
    ("train",),
    ("snapshots",),
    ("rank", "trial"),
    ("rank_entry",),
    ("tracking",),
    ("launch",),
    ("standalone",),
    ("cluster",),
    ("sdk",),
    ("cli_checkpoints", "cli_checks", "cli_cluster"),
    ("cli",),
    ("",),
)
LEVELS = {unit: level for level, units in enumerate(LAYERS) for unit in units}

# Library → the units that may import it. The Neuron libraries load device runtimes, so only inside functions.
NEURON_LIBRARIES = {"torch_neuronx", "torch_xla", "neuronx_distributed", "libneuronxla"}
HOMES = {
    "ray": {"launch"},
    "mlflow": {"tracking"},
    "boto3": {"cluster"},
    "torch": {
        *("models", "data", "optim", "checkpoint", "accelerators", "engines"),
        *("convert", "sampling", "train", "snapshots", "rank", "trial", "rank_entry", "standalone"),
    },
    **{library: {"accelerators", "engines"} for library in NEURON_LIBRARIES},
}
# Formats that run code when they are read. Ray itself pickles what launch/ hands it.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
UNSAFE_CALLS = {
    "torch.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "os.system",
}  # fmt: skip

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# "path" or "path:function" → the reason it may be longer. Empty, and meant to stay so.
TOO_LONG_ALLOWED: dict[str, str] = {}

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in SOURCES}


def module_of(path: Path) -> str:
    """ "config.load" for platform/raynium/config/load.py; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """The unit of LAYERS a module belongs to; the longest name wins."""
    while module not in LEVELS:
        assert "." in module, f"raynium.{module} has no layer: give it one in LAYERS"
        module = module.rpartition(".")[0]
    return module


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """(dotted name, statement) of every import, wherever it stands; `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not used here"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def calls_of(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name, call) of every call of a plain or dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def where(path: Path, node: ast.stmt | ast.expr) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


# ------------------------------------------------------------------------------------------------- layout


def test_platform_is_a_folder_and_not_a_package():
    assert not (ROOT / "platform.py").exists()
    assert [path.name for path in (ROOT / "platform").iterdir() if path.suffix in (".py", ".pyi")] == []
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/ stays flat: a package there can shadow `platform`"


def test_import_platform_is_the_standard_library_with_the_repository_first_on_the_path():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import platform; print(platform.__file__, platform.system())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    file, system = done.stdout.split()
    assert not Path(file).is_relative_to(ROOT / "platform")
    assert Path(file).name == "platform.py" and system


def test_no_job_is_named_like_a_library():
    # jobs/ is the first entry of a submitted script's path: jobs/ray.py would be what `import ray` finds.
    libraries = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions()) | set(HOMES)
    names = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "jobs").rglob("*")
             if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")}  # fmt: skip
    assert names & (libraries - {"configs"}) == set()


def test_nothing_imports_a_folder_that_is_no_package():
    for path in [*SOURCES, *(ROOT / "jobs").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for name, node in imports_of(ast.parse(path.read_text())):
            assert name.split(".")[0] not in ("jobs", "cluster", "tests"), f"{where(path, node)} imports {name}"


# ------------------------------------------------------------------------------------------------- imports


def test_arrows_go_down_only():
    wrong = []
    for path, tree in TREES.items():
        own = unit_of(module_of(path))
        for name, node in imports_of(tree):
            # A bare `import raynium` is part of importing any module of it.
            if name == "raynium" or name.split(".")[0] != "raynium":
                continue
            other = unit_of(_existing_module(name))
            if other != own and LEVELS[other] >= LEVELS[own]:
                wrong.append(f"{where(path, node)}: {own or 'raynium'} imports {name}, which is not below it")
    assert wrong == []


def _existing_module(name: str) -> str:
    """The module of "raynium.a.b.name", without the name of a function or class at its end."""
    parts = name.split(".")[1:]
    while parts and not (PACKAGE.joinpath(*parts).with_suffix(".py").exists() or PACKAGE.joinpath(*parts).is_dir()):
        parts.pop()
    return ".".join(parts)


def test_every_library_stays_in_its_home():
    wrong = []
    for path, tree in TREES.items():
        own = unit_of(module_of(path))
        for name, node in imports_of(tree):
            library = name.split(".")[0]
            if library in HOMES and own not in HOMES[library]:
                wrong.append(f"{where(path, node)}: {library} belongs in {', '.join(sorted(HOMES[library]))}")
    assert wrong == []


def test_neuron_libraries_are_imported_inside_functions_only():
    wrong = []
    for path, tree in TREES.items():
        in_functions = {
            id(node) for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(outer)
        }  # fmt: skip
        for name, node in imports_of(tree):
            if name.split(".")[0] in NEURON_LIBRARIES and id(node) not in in_functions:
                wrong.append(f"{where(path, node)}: importing {name} takes a device; do it in a function")
    assert wrong == []


LIGHT = [
    *("raynium", "raynium.sdk", "raynium.cli", "raynium.config.load", "raynium.config.rules", "raynium.config.resume"),
    *("raynium.hardware.catalog", "raynium.planning.memory", "raynium.models.flops", "raynium.models.plan"),
]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_what_people_import_loads_no_heavy_library(module):
    assert _loaded_by(module, {"torch", "ray", "mlflow", "transformers", "numpy"}) == set()


def test_a_rank_loads_neither_ray_nor_mlflow():
    assert _loaded_by("raynium.rank, raynium.rank_entry", {"ray", "mlflow"}) == set()


def _loaded_by(modules: str, heavy: set[str]) -> set[str]:
    code = f"import sys, {modules}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "platform")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# ------------------------------------------------------------------------------------------------- what is never used


def test_nothing_that_runs_code_is_read_from_storage():
    wrong = []
    for path, tree in TREES.items():
        unit = unit_of(module_of(path))
        for name, node in imports_of(tree):
            library = name.split(".")[0]
            if library in UNSAFE_MODULES and not (library == "cloudpickle" and unit == "launch"):
                wrong.append(f"{where(path, node)} imports {name}")
        for name, node in calls_of(tree):
            allows_pickle = any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
            )
            tensors_only = name == "torch.load" and any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
            )
            if (name in UNSAFE_CALLS and not tensors_only) or allows_pickle:
                wrong.append(f"{where(path, node)} calls {name}")
    assert wrong == []


def test_only_the_command_line_prints():
    wrong = [
        where(path, node)
        for path, tree in TREES.items()
        if module_of(path) != "cli"
        for name, node in calls_of(tree)
        if name == "print"
    ]
    assert wrong == [], "log instead: rank output is collected, and a library does not own the terminal"


def test_files_and_functions_stay_readable():
    wrong = []
    for path, tree in TREES.items():
        file = str(path.relative_to(ROOT))
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_FILE_LINES and file not in TOO_LONG_ALLOWED:
            wrong.append(f"{file}: {num_lines} lines, over {MAX_FILE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES and f"{file}:{node.name}" not in TOO_LONG_ALLOWED:
                    wrong.append(f"{file}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION_LINES}")
    assert wrong == []


# Home folders of somebody's machine. Those of the images that clusters run are part of the cluster files.
MACHINE_PATH = re.compile(r"(?<![\w.$}*)])/(?:root|home/(?!(?:ubuntu|ec2-user|ray)\b)[\w.-]+|Users/[\w.-]+)/")
TEXT_SUFFIXES = {".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".sh", ".json", ".cfg", ""}


def test_no_file_names_a_path_of_one_machine():
    folders = [ROOT / name for name in ("platform", "jobs", "cluster", "tests", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.iterdir())
    wrong = []
    for path in files:
        parts = path.relative_to(ROOT).parts
        if (
            not path.is_file()
            or path.suffix not in TEXT_SUFFIXES
            or any(p.endswith((".egg-info", "__pycache__")) for p in parts)
        ):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if found := MACHINE_PATH.search(line):
                wrong.append(f"{'/'.join(parts)}:{number}: {found.group()}")
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("cp /" + "home/anna/data .", True),
        ("x = '/" + "root/raynium'", True),
        ("cd /" + "Users/anna/raynium", True),
        ("ssh_user: ubuntu  # /home/ubuntu/raynium", False),
        ("https://example.com/home/page/", False),
        ("$HOME/home/runs/", False),
    ],
)
def test_machine_paths_are_told_from_others(line, found):
    assert bool(MACHINE_PATH.search(line)) == found
