"""The house rules of CONTRIBUTING.md, read from the source; each rule is also shown a culprit.

Run as a script, this prints the package's tree for the README.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "deepseek_jax"

FLOORS = [  # a file imports from a lower floor or its own room
    {"core"},
    {"ops", "parallel"},
    {"layers", "data"},
    {"models"},
    {"checkpoint", "monitoring"},
    {"training", "compression", "serving"},
    {"rl", "retrieval", "evaluation"},
    {"train", "generate", "evaluate", "prepare", "convert", "plan", "compress", "serve", "report"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS, 1) for room in rooms}
COMMANDS = FLOORS[-1]

BASE = {  # what setup.py installs without extras; the rest goes through core.extras.require
    "absl", "chex", "flax", "grain", "jax", "jaxlib", "jaxtyping", "matplotlib", "numpy", "optax",
    "orbax", "tensorboardX", "tensorstore", "tokenizers", "tyro",
}  # fmt: skip

ONLY_IN = {  # a module of ours or others -> the rooms or files that may import it
    "flax.linen": {"layers", "models"},
    "orbax": {"checkpoint/manager.py"},
    "tensorboardX": {"monitoring"},
    "matplotlib": {"monitoring"},
}
NO_JAX = {"core/config.py", "core/axes.py", "serving/completion.py", "serving/blocks.py",
          "serving/scheduler.py"}  # fmt: skip
VAGUE = {"utils", "util", "misc", "common", "helpers", "helper"}


def _files() -> dict[str, str]:
    folder = ROOT / PACKAGE
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*.py"))
    }


def _room(name: str) -> str:
    """The room of `layers/mla.py` or `deepseek_jax.layers.mla`; a command is its own."""
    return name.removeprefix(f"{PACKAGE}.").replace(".", "/").split("/")[0]


def _imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def _is(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def complaints(name: str, source: str) -> list[str]:
    """What one file does against the rules; `name` is its path inside the package."""
    tree = ast.parse(source)
    imports = _imports(tree)
    found = []
    room = _room(name.removesuffix(".py"))
    ours = [module for module in imports if _is(module, PACKAGE)]
    if name != "__init__.py" and room not in FLOOR_OF:
        found.append("is in no room of FLOORS")
    elif name != "__init__.py":
        for module in ours:
            other = _room(module)
            if other != room and FLOOR_OF.get(other, 99) >= FLOOR_OF[room]:
                found.append(f"imports {module}, which is not on a lower floor")
    for module in imports:
        top = module.split(".")[0]
        if not top:
            found.append("has a relative import")
        elif top not in BASE | {PACKAGE} | sys.stdlib_module_names:
            found.append(f"imports {module}: use core.extras.require")
        for limited, places in ONLY_IN.items():
            if _is(module, limited) and room not in places and name not in places:
                found.append(f"imports {module}, which only {sorted(places)} may")
        if name in NO_JAX and top in {"jax", "jaxlib", "flax"}:
            found.append(f"imports {module}, but must work without JAX")
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and _imports(function):
            found.append(f"imports inside {function.name}()")
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    by_name = any(call.endswith(("import_module", "__import__")) for call in calls)
    if by_name and name not in {"core/extras.py", "__init__.py"}:  # __init__: the lazy `load`
        found.append("imports by name; core.extras.require does that")
    if name != "parallel/manual.py" and any(
        isinstance(n, ast.Attribute) and n.attr == "shard_map" for n in ast.walk(tree)
    ):
        found.append("calls shard_map; only parallel/manual.py does")
    if len(source.splitlines()) > 400:
        found.append(f"has {len(source.splitlines())} lines, more than 400")
    if pathlib.PurePath(name).stem in VAGUE or room in VAGUE:
        found.append("has a name that says nothing")
    docstring = ast.get_docstring(tree)
    if source.strip() and not docstring:
        found.append("has no docstring")
    elif docstring and not docstring.splitlines()[0].endswith("."):
        found.append("has a docstring whose first line is no sentence")
    if room in COMMANDS and docstring and not docstring.startswith("Command: "):
        found.append("is a command whose docstring does not begin with 'Command: '")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "dataclass" in "".join(
            map(ast.unparse, node.decorator_list)
        ):
            fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
            if fields > 15 and (name, node.name) != ("training/recipe.py", "TrainConfig"):
                found.append(f"{node.name} has {fields} fields, more than 15")
    return found


def cycle(files: dict[str, str]) -> list[str]:
    """Files that import each other in a ring; empty when there are none."""
    modules = {f"{PACKAGE}.{name.removesuffix('.py').replace('/', '.')}": name for name in files}
    graph = {
        name: {modules[m] for i in _imports(ast.parse(source)) for m in modules if _is(i, m)}
        for name, source in files.items()
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        ring = next((r for n in sorted(graph[name]) if (r := visit(n, [*path, name]))), [])
        done.add(name)
        return ring

    return next((ring for name in sorted(graph) if (ring := visit(name, []))), [])


def tree() -> str:
    """The package as the README shows it: every file with the first sentence of its docstring."""
    rows, room = [], ""
    files = _files()
    for name in sorted(files, key=lambda n: ("/" in n, FLOOR_OF.get(_room(n), 0), n)):
        docstring = ast.get_docstring(ast.parse(files[name]))
        if not docstring:
            continue
        folder, _, file = name.rpartition("/")
        if folder != room:
            rows.append(f"  {folder}/")
            room = folder
        rows.append(f"{'    ' if folder else '  '}{file:<21}{docstring.splitlines()[0]}")
    return "\n".join([f"{PACKAGE}/", *rows])


@pytest.mark.parametrize("name", _files())
def test_house_rules(name):
    assert not complaints(name, _files()[name])


def test_no_cycles():
    assert not cycle(_files())


def test_every_folder_is_a_package():
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_base_packages_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text()
    base = setup.split("install_requires=[")[1].split("]")[0].replace("_", "-").lower()
    renamed = {"orbax": "orbax-checkpoint", "absl": "absl-py", "jaxlib": "jax"}
    assert all(f'"{renamed.get(name, name).lower()}>' in base for name in BASE)


def test_readme_shows_the_tree():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    assert tree() in readme.read_text(), "paste what `python tests/test_architecture.py` prints"


DOC = '"""Something."""\n'


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("ops/x.py", DOC + "from deepseek_jax.layers import mla", "lower floor"),
        ("ops/x.py", DOC + "import deepseek_jax.parallel.mesh", "lower floor"),
        ("serving/x.py", DOC + "from deepseek_jax.training.step import y", "lower floor"),
        ("train.py", '"""Command: x."""\nfrom deepseek_jax import generate', "lower floor"),
        ("core/x.py", DOC + "import deepseek_jax", "lower floor"),
        ("core/x.py", DOC + "from . import y", "relative"),
        ("core/x.py", DOC + "import torch", "extras"),
        ("core/x.py", DOC + "def f():\n    import json", "inside f()"),
        ("core/x.py", DOC + "class A:\n    def f(self):\n        import json", "inside f()"),
        ("core/x.py", DOC + "import importlib\nimportlib.import_module('torch')", "by name"),
        ("data/x.py", DOC + "import flax.linen as nn", "only"),
        ("training/x.py", DOC + "from orbax.checkpoint import v1", "only"),
        ("training/x.py", DOC + "import jax\njax.shard_map(f)", "shard_map"),
        ("core/axes.py", DOC + "import jax.numpy as jnp", "without JAX"),
        ("core/x.py", DOC + "\n" * 400, "lines"),
        ("core/utils.py", DOC, "says nothing"),
        ("core/x.py", "a = 1", "no docstring"),
        ("core/x.py", '"""Something"""', "no sentence"),
        ("train.py", DOC, "Command"),
        ("cooking/x.py", DOC, "no room"),
        ("bake.py", DOC, "no room"),
        (
            "core/x.py",
            DOC + "@dataclasses.dataclass(frozen=True)\nclass A:\n" + "    a: int\n" * 16,
            "16 fields",
        ),
    ],
)
def test_rules_can_fail(name, source, complaint):
    assert any(complaint in found for found in complaints(name, source))


def test_cycles_are_found():
    ring = {
        "ops/a.py": "from deepseek_jax.ops import b",
        "ops/b.py": "import deepseek_jax.ops.c",
        "ops/c.py": "from deepseek_jax.ops.a import something",
        "ops/d.py": "from deepseek_jax.ops import a",
    }
    assert cycle(ring) == ["ops/a.py", "ops/b.py", "ops/c.py", "ops/a.py"]


if __name__ == "__main__":
    print(tree())
