"What all commands share: results are shown before they are written, and written whole; paths, streams and options."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scipy.io import savemat

from di2l.commands import _form, _runs, evaluate
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
    assert done.returncode == 1 and "rank-1" in done.stdout and done.stderr == "error: [Errno 27] File too large: 'a.json'\n"
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
        assert done.returncode == 1 and "nowhere.mat: " in done.stderr and "No such file" in done.stderr, line


def permutations(folder, change=lambda order: order):
    "A file like the authors' for `features`, with a change in one of its entries."
    rng, table = np.random.default_rng(0), np.empty((6, 1), object)
    for cam in range(6):
        table[cam, 0] = np.empty((6, 1), object)
        for pid in range(6): table[cam, 0][pid, 0] = np.array([rng.permutation(4) + 1 for _ in range(10)], float)
    table[3, 0][2, 0] = change(table[3, 0][2, 0])
    savemat(folder / "perm.mat", {"rand_perm_cam": table})


@pytest.mark.parametrize("change, said", [
    (lambda order: order - 1, "camera 4, identity 3: found .1. 0. .* expected rows that are permutations"), (lambda order: order + 0.5, "camera 4, identity 3: found .* expected rows that are permutations"),
    (lambda order: np.maximum(order, 2), "camera 4, identity 3: found .* expected rows that are permutations"), (lambda order: order[:, :3], "camera 4, identity 3: expected|identity 3")])
def test_permutations_are_what_the_authors_file_must_be(tmp_path, change, said):
    features(tmp_path)
    permutations(tmp_path)
    asked = dict(features=tmp_path / "mine.npz", permutations=tmp_path / "perm.mat")
    evaluate(**asked)
    permutations(tmp_path, change)
    with pytest.raises(UserError, match=said): evaluate(**asked)


@pytest.mark.parametrize("change", [dict(pid=lambda pid: pid - 1), dict(pid=lambda pid: -pid), dict(frame=lambda frame: np.maximum(frame, 2)), dict(frame=lambda frame: frame - 1)], ids=["pid 0", "negative", "twice", "from 0"])
def test_identities_and_frames_are_what_the_permutations_count(tmp_path, change):
    features(tmp_path)
    permutations(tmp_path)
    table = dict(np.load(tmp_path / "mine.npz"))
    np.savez(tmp_path / "odd.npz", **{k: change.get(k, lambda v: v)(v) for k, v in table.items()})
    with pytest.raises(UserError, match="frame|identit|pid"): evaluate(features=tmp_path / "odd.npz", permutations=tmp_path / "perm.mat")


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
