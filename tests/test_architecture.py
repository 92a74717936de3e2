"""The shape of the repository: who may import whom, what is never used, and that importing Raynium is cheap.

Rules are read from the syntax tree, so a forbidden import is found wherever it stands, also inside a function.
"""

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform/raynium"

# Room → the rooms it may import; it may import what those may, too. A dotted room is a module or folder with its own
# rule. Every room may import what stands in EVERYBODYS. raynium/__init__.py ("") is above all.
EVERYBODYS = ("errors", "config", "config.judged", "hardware")
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "config": ("errors",),
    "config.judged": ("config",),
    "config.reference": ("config",),
    "hardware": ("errors", "config"),
    "storage": (),
    "models.plan": (),
    "models.adapter": (),
    "models.flops": ("models.adapter",),
    "models.pieces": (),
    "models": ("models.plan", "models.flops", "models.pieces"),
    "data.text": ("storage",),
    "data.order": (),
    "data.batch": (),
    "data.records": ("data.text",),
    "data.packing": ("data.batch", "data.order", "data.records", "storage"),
    "data.tokenizer": ("data.records",),
    "data": ("data.text", "data.order", "data.packing", "data.tokenizer"),
    "data.questions": ("data",),
    "data.judges": ("data.questions",),
    "data.build": ("data",),
    "checkpoint.state": (),
    "checkpoint.format": ("checkpoint.state", "storage"),
    "checkpoint": ("checkpoint.format",),
    "accelerators": (),
    "health": ("accelerators",),
    "planning": ("models.plan", "models.flops", "models.pieces"),
    "tasks": ("models", "data"),
    "engines.base": ("checkpoint.state", "tasks"),
    "engines.collectives": (),
    "engines": ("engines.base", "engines.collectives", "models", "data", "accelerators"),
    "train": ("engines",),
    "rank": ("train", "checkpoint", "health", "data.judges"),
    "tracking": (),
    "run.held_images": (),
    "run.positions": (),
    "run.points": ("tracking", "storage"),
    "run.protocol": ("run.held_images", "run.positions", "run.leaps", "run.points", "health"),
    "run.fence": ("storage",),
    "run.record": ("run.fence", "tracking"),
    "run.leaps": (),
    "run.recovery": ("run.leaps", "run.protocol", "checkpoint"),
    "run.verdicts": ("run.protocol",),
    "run": ("run.verdicts", "run.record", "run.recovery", "checkpoint"),
    "node.diagnosis": ("run", "train"),
    "node.compile_cache": ("accelerators", "run"),
    "node.images": ("run", "train"),
    "node.node_zero": ("run", "tracking"),
    "node.copy_failures": (),
    "node.copy_queue": ("node.images",),
    "node.buddies": ("node.copy_queue", "node.copy_failures"),
    "node": (
        *("node.diagnosis", "node.buddies", "node.compile_cache", "node.node_zero"),
        *("rank", "run.bad_nodes", "planning"),
    ),
    "convert": ("checkpoint", "models", "data"),
    "generation": ("convert", "data.questions"),
    "terminal": ("run", "rank"),
    "launch.page": ("terminal",),
    "launch.notify": ("terminal",),
    "run.bad_nodes": ("run",),
    "launch.tasks": (),
    "launch.nodes": (),
    "launch.ray_environment": ("node",),
    "launch.job_metadata": (),
    "launch.preparation": ("node", "convert", "data.build", "launch.notify", "launch.job_metadata"),
    "launch": (
        "config.reference",
        "launch.page",
        "launch.ray_environment",
        "run.bad_nodes",
        "cluster.instances",
        "node",
        "generation",
        "terminal",
        "data.build",
        "launch.preparation",
        "launch.tasks",
        "launch.nodes",
    ),
    "launch.data": ("launch",),
    "standalone": ("launch",),
    "cluster.instances": (),
    "cluster": (),
    "sdk": ("launch.data",),
    "chaos": ("launch.ray_environment", "run.bad_nodes", "rank"),
    "cli": ("sdk", "cluster", "chaos"),
    "": ("cli",),
}


def _reachable(room: str) -> set[str]:
    below = {*ROOMS[room], *(EVERYBODYS if room not in EVERYBODYS else ())}
    return below.union(*(_reachable(each) for each in below))


MAY_IMPORT = {room: _reachable(room) for room in ROOMS}

# Library → the rooms that may import it. The Neuron libraries load device runtimes, so only inside functions.
NEURON_LIBRARIES = {"torch_neuronx", "torch_xla", "neuronx_distributed", "libneuronxla"}
HOMES = {
    "ray": {"launch", "launch.tasks", "launch.nodes", "launch.data"},
    "mlflow": {"tracking"},
    "s3fs": {"storage"},
    "fsspec": {"storage"},
    "pyarrow": {"storage", "data.text"},
    "boto3": {"cluster"},
    "botocore": {"cluster.instances", "storage"},
    "jinja2": {"data.records"},
    "torch": {
        *(
            "models",
            "data",
            "data.batch",
            "checkpoint",
            "checkpoint.state",
            "checkpoint.format",
            "accelerators",
            "engines",
            "engines.base",
            "engines.collectives",
        ),
        *("convert", "generation", "tasks", "train", "rank", "standalone"),
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
MAX_ROOM_LINES = 2500
# "path" or "path:function" → the reason it may be longer. Empty, and meant to stay so.
TOO_LONG_ALLOWED: dict[str, str] = {}

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in SOURCES}


def module_of(path: Path) -> str:
    """ "config.load" for platform/raynium/config/load.py; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room a module belongs to; the longest name wins."""
    while module not in ROOMS:
        assert "." in module, f"raynium.{module} is in no room: give it one in ROOMS"
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


def test_rooms_import_only_what_they_may():
    wrong = []
    for path, tree in TREES.items():
        own = room_of(module_of(path))
        for name, node in imports_of(tree):
            # A bare `import raynium` is part of importing any module of it.
            if name == "raynium" or name.split(".")[0] != "raynium":
                continue
            other = room_of(_existing_module(name))
            if other != own and other not in MAY_IMPORT[own]:
                wrong.append(f"{where(path, node)}: {own or 'raynium'} may not import {name}")
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
        own = room_of(module_of(path))
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


def test_no_module_imports_itself_by_way_of_others():
    known = {module_of(path) for path in SOURCES}
    arrows = {
        module_of(path): {_existing_module(name) for name, _ in imports_of(tree) if name.startswith("raynium.")} & known
        for path, tree in TREES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle of imports: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for other in sorted(arrows[module] - {module, ""}):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(arrows):
        visit(module, ())


LIGHT = [
    *(
        "raynium",
        "raynium.sdk",
        "raynium.cli.app",
        "raynium.config.load",
        "raynium.planning.rules",
        "raynium.config.resume",
    ),
    *("raynium.hardware.catalog", "raynium.planning.memory", "raynium.models.flops", "raynium.models.plan"),
    "raynium.models.adapter",
    "raynium.tasks.base",
]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_what_people_import_loads_no_heavy_library(module):
    assert _loaded_by(module, {"torch", "ray", "mlflow", "transformers", "numpy"}) == set()


def test_a_rank_loads_neither_ray_nor_mlflow():
    assert _loaded_by("raynium.rank.build, raynium.rank.entry", {"ray", "mlflow"}) == set()


def test_the_agent_and_the_coordinator_load_neither_torch_nor_ray():
    assert _loaded_by("raynium.node.agent, raynium.run.coordinator", {"torch", "ray", "mlflow"}) == set()


def _loaded_by(modules: str, heavy: set[str]) -> set[str]:
    code = f"import sys, {modules}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "platform")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


# ------------------------------------------------------------------------------------------------- what is never used


def test_nothing_that_runs_code_is_read_from_storage():
    wrong = []
    for path, tree in TREES.items():
        room = room_of(module_of(path))
        for name, node in imports_of(tree):
            library = name.split(".")[0]
            if library in UNSAFE_MODULES and not (library == "cloudpickle" and room == "launch"):
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


def test_text_is_utf8_whatever_the_locale():
    wrong = []
    for path, tree in TREES.items():
        for name, node in calls_of(tree):
            said = {keyword.arg for keyword in node.keywords}
            last, modes = name.rpartition(".")[2], node.args[1:2] if name == "open" else node.args[:1]
            mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None if modes else "r"
            opens_text = last == "open" and name != "os.open" and isinstance(mode, str) and "b" not in mode
            if (
                opens_text
                or last in ("fdopen", "TextIOWrapper", "NamedTemporaryFile")
                or name.endswith((".read_text", ".write_text"))
                or last.endswith("FileHandler")
                or (said & {"text", "universal_newlines"} and name.startswith("subprocess."))
            ) and "encoding" not in said:
                wrong.append(f"{where(path, node)} calls {name}")
    assert wrong == [], 'say encoding="utf-8": Python takes that of the locale'


def test_a_home_folder_that_may_not_be_there_is_not_taken_for_granted():
    wrong = [
        where(path, node)
        for path, tree in TREES.items()
        for name, node in calls_of(tree)
        if name.endswith((".expanduser", "Path.home")) and name != "os.path.expanduser"
    ]
    assert wrong == [], "those of pathlib raise RuntimeError where there is none: config/local_folders.py has others"


def test_only_the_command_line_prints():
    wrong = [
        where(path, node)
        for path, tree in TREES.items()
        if room_of(module_of(path)) != "cli"
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


# What a comment after code may be: words to a tool, about that line.
TO_A_TOOL = re.compile(r"# ?(noqa|pyright:|type:|fmt:)")


def trailing_comments(source: str) -> Iterator[tuple[int, str]]:
    """(line number, comment) of each that stands after code and is for people."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        number, column = token.start
        if token.type != tokenize.COMMENT or not lines[number - 1][:column].strip():
            continue
        if not all(TO_A_TOOL.match(part) for part in re.findall("#[^#]*", token.string)):
            yield number, token.string


def test_comments_stand_above_the_line():
    wrong = [
        f"{path.relative_to(ROOT)}:{number} {comment}"
        for path in SOURCES
        for number, comment in trailing_comments(path.read_text())
    ]
    assert wrong == [], "make it a sentence above the line or in a docstring, or let the names say it"


@pytest.mark.parametrize(
    ("source", "numbers"),
    [
        ("# Of that life.\nseen = 0", []),
        ("seen = 0  # of that life", [1]),
        ("call(\n    # The first.\n    1,\n    2,  # the second\n)", [4]),
        ("mark = '# of that life'", []),
        ('"""\ntext\n"""  # of that life', [3]),
        ("import torch  # noqa: F401", []),
        ("import torch  # noqa: F401  # pyright: ignore", []),
        ("import torch  # noqa: F401  # to have it warm", [1]),
    ],
)
def test_comments_after_code_are_told_from_others(source, numbers):
    assert [number for number, _ in trailing_comments(source)] == numbers


def test_no_room_outgrows_the_others():
    lines: dict[str, int] = {}
    for path in SOURCES:
        room = room_of(module_of(path))
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    assert {room: count for room, count in lines.items() if count > MAX_ROOM_LINES} == {}


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
