"""No op goes without a reference and a gradient check."""

import importlib
import pathlib

from tinydiff import ops


def test_every_op_is_in_a_table_of_cases():
    modules = [
        f"tests.ops.{p.stem}" for p in pathlib.Path(__file__).parent.glob("test_*.py") if p.stem != "test_coverage"
    ]
    checked = {case.op for name in modules for case in getattr(importlib.import_module(name), "CASES", [])}
    assert set(ops.__all__) - checked == set(), "these ops have no case in tests/ops"
    assert checked - set(ops.__all__) == set(), "these are no public ops"


def test_every_public_function_of_the_ops_folder_is_exported():
    folder = pathlib.Path(ops.__file__).parent
    for path in folder.glob("[a-z]*.py"):
        module = importlib.import_module(f"tinydiff.ops.{path.stem}")
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
            and not isinstance(value, type)
        }  # fmt: skip
        assert public <= set(ops.__all__), f"{path.name}: {public - set(ops.__all__)}"
