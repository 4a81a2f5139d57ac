"""What may import what: the cut of the code, read from the code."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("richkd", "tune")
    for path in (ROOT / package).rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Return every module that `module` imports anywhere, `from a import b` as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


def tops(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def test_the_science_knows_no_cluster():
    for module in FILES:
        if module.split(".")[0] == "richkd":
            assert not tops(module) & {"ray", "mlflow", "optuna", "tune"}, module


def test_only_tracking_knows_mlflow():
    assert [module for module in FILES if "mlflow" in tops(module)] == ["tune.tracking"]


def test_the_cluster_knows_no_tensors():
    allowed = {"tune.trial", "tune.worker"}  # set the number of threads of their process
    for module in FILES:
        if module.split(".")[0] == "tune" and module not in allowed:
            assert "torch" not in tops(module), module


def test_there_is_no_import_cycle():
    # a package's own __init__ and its modules import each other by design: what counts is other modules
    graph = {
        module: {
            name
            for name in imports(module)
            if name in FILES and not f"{module}.".startswith(f"{name}.")
        }
        for module in FILES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_richkd_imports_without_the_packages_of_a_cluster():
    code = """
import sys
for name in ("ray", "mlflow", "optuna", "open_clip"):
    sys.modules[name] = None  # an import of it raises
import richkd, richkd.distill, richkd.teachers, richkd.student, richkd.__main__
from richkd import load_student
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_nothing_is_unpickled_or_evaluated():
    words = (
        "weights_only=" + "False",
        "pickle." + "load",
        "yaml." + "load(",
        "ev" + "al(",
        "ex" + "ec(",
    )
    for module, path in FILES.items():
        text = path.read_text().replace(".eval()", "")
        assert not [word for word in words if word in text], module
