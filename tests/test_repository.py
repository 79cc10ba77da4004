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


def exported(path):
    "The module that a notebook exports to, or None."
    found = re.search(r"#\| default_exp ([\w.]+)", "\n".join(map(source, cells(path))))
    return found and found.group(1)


MODULES = {name: path for path in NOTEBOOKS if (name := exported(path))}
READING = [name for name, path in MODULES.items() if path.stem < "30"]


def module_file(name):
    return ROOT / "di2l" / (name.replace(".", "/") + ".py")


def lines_of(path):
    "Lines that a notebook exports, blank ones and directives aside."
    code = [source(c) for c in cells(path)]
    return sum(1 for s in code if "#| export" in s for line in s.splitlines() if line.strip() and not line.startswith("#|"))


def imports(name, everywhere=True):
    "Modules of di2l that a module imports; with `everywhere` also inside its functions."
    tree, found = ast.parse(module_file(name).read_text(encoding="utf-8")), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "di2l"):
            tail = (node.module or "") if node.level else node.module.removeprefix("di2l").strip(".")
            whole = ".".join([*(name.split(".")[:-node.level] if node.level else []), *([tail] if tail else [])])
            found |= {whole} if whole in MODULES else {f"{whole}.{a.name}".strip(".") for a in node.names}
    return found & MODULES.keys()


def test_a_line_fits_the_pane_and_a_cell_holds_one_idea():
    "A JupyterLab pane in a window of 1,500 pixels shows about 115 characters."
    wide, long = [], []
    for path in NOTEBOOKS:
        code = [source(c).splitlines() for c in cells(path)]
        wide += [f"{path.stem}: {line[:60]}" for lines in code for line in lines if len(line) > 110]
        too_long = [f"{path.stem}: {len(lines)} lines from {lines[0][:60]!r}" for lines in code if len(lines) > 40]
        long += too_long if len(too_long) > 1 else []
    assert wide == [] and long == []


def test_no_notebook_on_the_reading_path_is_long():
    "Pieces of the paper 200 exported lines at most, the idea of evaluation 250, any other 300."
    most = dict.fromkeys(READING, 300) | {f"{n}": 200 for n in ("rca", "non_local", "dpa", "focal", "wrt", "model")} | {"eval": 250}
    assert {n: k for n in READING if (k := lines_of(MODULES[n])) > most[n]} == {}


def test_package_is_small():
    "The package without the methods of Table 1's other rows."
    counted = {n: lines_of(p) for n, p in MODULES.items() if not n.startswith("methods.")}
    assert sum(counted.values()) <= 4680, counted


def test_notebook_order_is_import_order():
    "The reading path imports what the reader has met, or an engine room; engine rooms run in no circle."
    assert len(READING) >= 10
    for place, name in enumerate(READING):
        later = [used for used in imports(name) if used in READING[place:]]
        assert later == [], f"{name} imports what comes later: {later}"


def test_no_circles():
    "At import time, that is outside of functions."
    graph = {name: imports(name, everywhere=False) for name in MODULES}
    while free := [name for name, used in graph.items() if not used & graph.keys()]:
        for name in free: del graph[name]
    assert graph == {}


def test_evaluation_never_imports_training():
    seen, todo = set(), ["eval"]
    while todo:
        name = todo.pop()
        seen.add(name)
        todo += imports(name) - seen
    assert "train" not in seen and "experiments" not in seen


def test_documented():
    "Every public function and class says what it does; a patched method is its class's, like those that stand in it."
    silent = []
    for name in MODULES:
        for node in ast.parse(module_file(name).read_text(encoding="utf-8")).body:
            if any(ast.unparse(d) == "patch" for d in getattr(node, "decorator_list", [])): continue
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{name}.{node.name}")
    assert silent == []


def test_importing_is_cheap():
    "What trains and evaluates costs less than 0.3 s of processor time beyond torch: the least of five, for other programs only add to it."
    of_records = {f"methods.{n}" for n in ("tuning", "measured", "translations", "recipe_rows", "spectra")}      # they import the experiments
    names = [n for n in MODULES if n.split(".")[0] not in ("experiments", "results") and n not in of_records]
    code = ("import torch, time; t = time.process_time(); " + "; ".join(f"import di2l.{n}" for n in names) + "; print(time.process_time() - t)")
    seconds = sorted(float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout) for _ in range(5))
    assert seconds[0] < 0.3, f"importing di2l took {seconds[0]:.2f} s beyond torch"


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


def test_what_the_notebooks_cite_is_on_record():
    "Looked at before the notebooks run: they would train for hours to make what is missing. A search may be under way."
    from di2l import experiments

    missing = [row for row in experiments.plan(results=ROOT / "results") if row[0] not in experiments.SEARCH]
    assert missing == [], "`make results` makes them"
