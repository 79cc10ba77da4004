"Every command of the README is run: `make` targets are checked to exist, the others on the small benchmark, made small."
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from di2l.data.records import read_sysu
from di2l.synthetic.benchmark import write_benchmark

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [line for line in LINES if line]
SMALL = {"di2l_train": "--backbone resnet10 --weights none --size 96x48 --steps 2 --device cpu --precision fp32",
         "di2l_search": "--device cpu"}     # ResNet-50 at 288×144 with downloaded weights is another test's


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with what the README's reader is said to have: a dataset, its permutations, features of another program, images."
    folder = tmp_path_factory.mktemp("readme")
    data = read_sysu(write_benchmark(folder / "SYSU-MM01", preset="tiny", seed=0))
    write_permutations(folder / "rand_perm_cam.mat", data.records)
    test = data.test
    features = np.random.default_rng(0).normal(size=(len(test), 16)).astype(np.float32)
    np.savez(folder / "mine.npz", features=features, **{k: test[k].to_numpy() for k in ("pid", "cam", "frame")})
    (folder / "folder").mkdir()
    for i, path in enumerate(test[test.modality == "visible"].path[:12]): (folder / "folder" / f"{i}.jpg").write_bytes((data.root / path).read_bytes())
    (folder / "person.jpg").write_bytes((data.root / test[test.modality == "infrared"].path.iloc[0]).read_bytes())
    return folder


def write_permutations(path, records):
    "A file like the authors': for each camera and identity ten permutations of its images."
    rng, counts = np.random.default_rng(0), records.groupby(["cam", "pid"]).size()
    cell = np.empty((6, 1), object)
    for cam in range(1, 7):
        cell[cam - 1, 0] = np.empty((int(records.pid.max()), 1), object)
        for pid in range(1, int(records.pid.max()) + 1):
            n = int(counts.get((cam, pid), 0))
            cell[cam - 1, 0][pid - 1, 0] = np.array([rng.permutation(n) + 1 for _ in range(10)], np.uint16).reshape(10, n)
    savemat(path, {"rand_perm_cam": cell})


def test_readme_shows_commands():
    shown = {line.split()[0] for line in COMMANDS}
    assert {"make", "di2l_verify", "di2l_train", "di2l_eval", "di2l_search"} <= shown


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_knows_the_target(line):
    done = subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in COMMANDS if not line.startswith("make ")])
def test_command_runs_as_shown(line, place):
    "In the README's order: a run is searched and scored after it was trained."
    words = shlex.split(line.replace("/data/SYSU-MM01", str(place / "SYSU-MM01")))
    words += shlex.split(SMALL.get(words[0], ""))
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=place, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    for option, made in (("--json", "mine.json"), ("--html", "page.html"), ("--out", "runs/sysu/summary.json")):
        if option in words: assert (place / made).stat().st_size > 100
