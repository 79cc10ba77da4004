"The repository itself: package and notebooks agree, notebooks are clean, the README's commands and numbers are true, importing is cheap."
import ast
import json
import re
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
BIN = Path(sys.executable).parent


def source(cell):
    return "".join(cell["source"])


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what is under version control or would be, in which export and cleaning may write."
    out = tmp_path_factory.mktemp("copy") / "di2l"
    out.mkdir()
    for name in ("nbs", "di2l"):
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "README.md"):
        shutil.copy(ROOT / name, out / name)
    return out


def contents(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob(pattern))}


def test_export_reproduces_the_package(copy):
    before = contents(ROOT / "di2l", "*.py")
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    after = contents(copy / "di2l", "*.py")
    assert before.keys() == after.keys()
    assert [n for n in before if before[n] != after[n]] == [], "these modules differ from their notebooks: run nbdev_export"


def test_notebooks_are_clean(copy):
    before = contents(ROOT / "nbs", "*.ipynb")
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True)
    after = contents(copy / "nbs", "*.ipynb")
    assert [n for n in before if "checkpoint" not in n and before[n] != after[n]] == [], "these notebooks are not clean: run nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_in_style(path):
    first = cells(path, "markdown")[0]
    assert re.match(r"# .+\n+> .+", source(first)), "a notebook starts with a title and a one-line subtitle"
    code = [source(c) for c in cells(path)]
    if any("#| export" in c for c in code):
        assert any("test_" in c or "assert" in c for c in code if "#| export" not in c), "exports without a test cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_carry_nothing_of_one_machine(path):
    for cell in cells(path):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"a cell ended in an error: {source(cell)[:80]}"
            texts = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps([texts, output.get("text", "")])
            assert not re.search(r"/(root|home|tmp|work|Users|private)/|[A-Z]:\\\\Users", text), f"a path in the output of: {source(cell)[:80]}"
            assert not re.search(r"\b\d\d:\d\d:\d\d\b|it/s|images/s|\bETA\b", text), f"a time in the output of: {source(cell)[:80]}"


def modules_in_order():
    return {re.search(r"#\| default_exp (\w+)", s).group(1): i for i, p in enumerate(NOTEBOOKS) for c in cells(p)
            if "#| default_exp" in (s := source(c))}


def test_notebook_order_is_import_order():
    order = modules_in_order()
    assert len(order) >= 11
    for name, place in order.items():
        tree = ast.parse((ROOT / "di2l" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("di2l") or isinstance(node, ast.ImportFrom) and node.level:
                tail = (node.module or "").removeprefix("di2l").strip(".")
                for used in [tail] if tail else [a.name for a in node.names]:
                    assert order.get(used, -1) < place, f"{name} imports {used}, which comes later"


def test_evaluation_never_imports_training():
    assert not re.search(r"import .*\btrain\b|di2l\.train", (ROOT / "di2l" / "eval.py").read_text(encoding="utf-8"))


def test_documented():
    "Every public function and class says what it does."
    silent = []
    for name in modules_in_order():
        for node in ast.parse((ROOT / "di2l" / f"{name}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{name}.{node.name}")
    assert silent == []


def test_importing_is_cheap():
    "All modules cost less than 0.3 s of processor time beyond torch: the median of five, torch's own import taken out."
    names = [n for n in modules_in_order() if n != "experiments"]
    code = ("import torch, time; t = time.process_time(); " + "; ".join(f"import di2l.{n}" for n in names) + "; print(time.process_time() - t)")
    seconds = sorted(float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout) for _ in range(5))
    assert seconds[2] < 0.3, f"importing di2l took {seconds[2]:.2f} s beyond torch"


@pytest.mark.parametrize("command", ["di2l_synth", "di2l_verify", "di2l_train", "di2l_eval", "di2l_search", "di2l_experiments", "di2l_reproduce"])
def test_commands_have_help(command):
    run = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "usage" in run.stdout.lower() and "Traceback" not in run.stderr


def test_commands_are_declared():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    for line in cfg["DEFAULT"]["console_scripts"].split():
        module, function = line.split("=")[1].split(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        assert any(isinstance(n, ast.FunctionDef) and n.name == function for n in tree.body), line


def test_repository_is_small():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so what belongs to the repository is not known")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    size = sum((ROOT / f).stat().st_size for f in files if f and (ROOT / f).exists())
    assert size < 15e6, f"the repository has {size / 1e6:.1f} MB"


def test_every_planned_run_is_on_record():
    "Looked at before the notebooks run: they would train for hours to make what is missing."
    from di2l import experiments

    assert experiments.plan(results=ROOT / "results") == [], "`make results` makes them"
