"""What is shipped, what importing costs, and what must not be in the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    names = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fedkd", "fedkd-0.1.0.dist-info"}
    entry = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).read("fedkd-0.1.0.dist-info/entry_points.txt").decode()
    assert "fedkd = fedkd.cli.main:main" in entry
    assert "fedkd/cli/main.py" in names and not [n for n in names if n.endswith(".pyc")]


def test_importing_the_library_loads_nothing_heavy() -> None:
    code = "import sys, fedkd; print(sorted({'torch', 'flwr', 'ray', 'sklearn', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_simulating_does_not_load_flower() -> None:
    code = "import sys, fedkd.simulate, fedkd.cli.main; print('flwr' in sys.modules or 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def _dangerous(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                a.name for a in node.names if a.name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal")
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "pickle",
            "cloudpickle",
            "dill",
        ):
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            named = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                found.append(name)
            if name == "torch.load" and named.get("weights_only") != "True":
                found.append("torch.load")
            if named.get("allow_pickle") == "True":
                found.append("allow_pickle=True")
    return found


def test_nothing_in_the_tree_runs_what_came_from_outside() -> None:
    files = [p for folder in ("fedkd", "server", "clients", "simulations") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    faults = {str(p.relative_to(ROOT)): found for p in files if (found := _dangerous(ast.parse(p.read_text())))}
    assert faults == {}


def test_the_scan_finds_what_it_looks_for() -> None:
    source = "import pickle\nyaml.load(x)\ntorch.load(f)\nnp.load(f, allow_pickle=True)\neval('1')\n"
    assert len(_dangerous(ast.parse(source))) == 5
