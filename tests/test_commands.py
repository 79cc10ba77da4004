"What all commands share: results are shown before they are written, and written whole; paths, streams and options."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from di2l.commands import _form, _runs
from di2l.console import UserError

BIN = Path(sys.executable).parent


def features(folder, seed=0):
    "Features of six people by SYSU-MM01's six cameras, four images each."
    pid, cam, frame = (a.ravel() for a in np.meshgrid(np.arange(1, 7), np.arange(1, 7), np.arange(1, 5), indexing="ij"))
    x = np.random.default_rng(seed).normal(size=(len(pid), 8)).astype(np.float32)
    np.savez(folder / "mine.npz", features=x, pid=pid, cam=cam, frame=frame, unneeded=np.zeros(1000))
    return folder / "mine.npz"


def shell(line, cwd, **env):
    return subprocess.run(["bash", "-c", f"set -o pipefail; export PATH={BIN}:$PATH; {line}"], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=300)


def test_a_result_that_cannot_be_written_has_been_shown(tmp_path):
    features(tmp_path)
    done = shell("di2l_eval --features mine.npz --json /proc/impossible/a.json", tmp_path)
    assert done.returncode == 1 and "rank-1" in done.stdout and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    "A file that may not grow past four blocks, as on a full disk: the old result stays, and nothing else."
    features(tmp_path)
    (tmp_path / "a.json").write_text("old")
    done = shell("trap '' XFSZ; ulimit -f 4; di2l_eval --features mine.npz --json a.json", tmp_path)
    assert done.returncode == 1 and "rank-1" in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "a.json").read_text() == "old" and not list(tmp_path.glob(".*.tmp"))


def test_home_is_meant_in_every_path(tmp_path):
    features(tmp_path)
    done = shell("di2l_eval --features=~/mine.npz --json=~/out/a.json", "/", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads((tmp_path / "out" / "a.json").read_text())["mAP"] <= 1


@pytest.mark.parametrize("line", ["di2l_eval --features mine.npz | head -0", "di2l_eval --features mine.npz 2>&-", "di2l_train --help | head -1"])
def test_a_reader_that_goes_away_changes_no_status(tmp_path, line):
    features(tmp_path)
    done = shell(line, tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


def test_permutations_that_are_nowhere_are_said(tmp_path):
    for line in ("di2l_verify sysu . --permutations nowhere.mat", "di2l_eval --features mine.npz --permutations nowhere.mat"):
        features(tmp_path)
        done = shell(line, tmp_path)
        assert done.returncode == 1 and "nowhere.mat: no such file" in done.stderr, line


def test_a_run_counts_once_and_may_have_a_comma(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b").mkdir()
    assert _runs("a,b") == [Path("a,b")] and _runs("x, y") == [Path("x"), Path("y")]
    for twice in ("x,x", "x,./x", f"x,{tmp_path}/x"):
        with pytest.raises(UserError, match="twice"): _runs(twice)


def test_options_that_do_nothing_are_refused():
    nothing = dict(run=None, features=None, gallery=None, protocol=None)
    for given, name in ((dict(run="a", trials=3), "trials"), (dict(features="f", flip=True), "flip"), (dict(features="f", protocol="regdb", shots=1), "shots"),
                        (dict(features="f", gallery="g", mode="all"), "mode"), (dict(features="f", device="cpu"), "device")):
        with pytest.raises(UserError, match=f"--{name} does nothing"): _form(nothing | given)
