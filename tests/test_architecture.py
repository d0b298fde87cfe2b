"""The package's shape: which file imports which, where devices may be spoken of, and that all of it is documented."""

import ast
import functools
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "tinydiff"
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {  # part: the parts of the package that it may import, beside itself
    "compiled": set(),
    "backend": set(),
    "formula": {"compiled", "backend"},
    "rng": {"backend"},
    "autograd": {"backend"},
    "ops": {"formula", "autograd", "backend", "rng"},
    "gradcheck": {"autograd", "rng"},
    "nn": {"ops", "autograd", "backend", "rng"},
    "optim": {"nn", "formula", "autograd", "backend"},
    "diffusion": {"ops", "autograd", "backend", "rng"},
    "files": set(),
    "image": {"backend", "files"},
    "checkpoint": {"files"},
    "data": {"backend", "rng", "image", "files"},
    "workers": {"optim", "autograd", "backend"},
    "metrics": {"rng"},
    "retrieval": {"files"},
}
"""models, train and what else stands on top may import all of these; nothing here may import those."""

DEVICE_WORDS = {"xp", "cupy", "cp", "gpu", "cuda", "is_cuda", "on_gpu"}

ALLOWED_AT_THE_TOP = {"pyproject.toml", "README.md", "LICENSE", "tinydiff", "lessons", "examples", "tests"}


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def part(path):
    """The part of the package a file belongs to: ops, nn, backend, ..."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every import in a file, also inside functions: (module, name or None)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def parts_imported(path):
    """The parts of the package that a file imports."""
    for module, name in imports(path):
        if module == "tinydiff" and name is not None:
            yield name
        elif module.startswith("tinydiff."):
            yield module.split(".")[1]


def name_of(path):
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@each_file
def test_imports_point_one_way(path):
    if part(path) in MAY_IMPORT:
        allowed = MAY_IMPORT[part(path)] | {part(path)}
        assert set(parts_imported(path)) <= allowed, f"{part(path)} may import {sorted(allowed)}"


def test_the_layers_have_no_cycle():
    """Each part only imports parts that can be read before it."""
    read = set()
    while left := set(MAY_IMPORT) - read:
        ready = {name for name in left if MAY_IMPORT[name] <= read}
        assert ready, f"these need each other: {sorted(left)}"
        read |= ready


@each_file
def test_no_relative_and_no_star_imports(path):
    assert not [m for m, name in imports(path) if m.startswith(".") or name == "*"]


@each_file
def test_only_the_backend_imports_cupy(path):
    found = {module.split(".")[0] for module, _ in imports(path)}
    assert "cupy" not in found or path.name == "backend.py"
    assert "cupyx" not in found


def identifiers(path):
    """The words of all names in a file: of variables, attributes, arguments, functions, and of what is imported."""
    for node in ast.walk(tree(path)):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        yield from (name for name in names if isinstance(name, str))


@each_file
def test_models_and_diffusion_speak_of_no_device(path):
    if part(path) in ("nn", "diffusion", "models"):
        words = {word.lower() for name in identifiers(path) for word in (name, *name.split("_"))}
        assert not words & DEVICE_WORDS


@each_file
def test_ops_multiply_matrices_where_a_captured_function_can(path):
    """By backend.product or backend.matmul; np.matmul says that the arrays are NumPy's."""
    if part(path) == "ops":
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                vectors = path.name == "loss.py"  # an inner product is no call of cuBLAS's
                assert vectors, f"line {node.lineno}: @"
            if isinstance(node, ast.Attribute) and node.attr in ("matmul", "dot", "einsum", "tensordot"):
                assert isinstance(node.value, ast.Name) and node.value.id in ("np", "backend"), f"line {node.lineno}"


@each_file
def test_no_exec_no_globals_no_passed_through_keywords(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval"), f"line {node.lineno}: {node.func.id}"
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
            assert path.name == "autograd.py", f"line {node.lineno}: **{node.args.kwarg.arg}"


def public_definitions(path):
    """The module, its public functions and classes, and the public methods of those classes."""
    yield "module", tree(path)
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method


def is_declaration(node):
    """Whether a function has no body but an ellipsis: it says what another one must look like."""
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.value.value is ...


SELF_EXPLAINING = {"Tensor.shape", "Tensor.ndim", "Tensor.size", "Tensor.dtype"}


@each_file
def test_everything_public_has_a_docstring(path):
    missing = [
        name
        for name, node in public_definitions(path)
        if not ast.get_docstring(node) and name not in SELF_EXPLAINING and not is_declaration(node)
    ]
    assert not missing


def test_the_top_of_the_repository_is_tidy():
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a checkout of the repository")
    top = {line.split("/")[0] for line in listing.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= ALLOWED_AT_THE_TOP
