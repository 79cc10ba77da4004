"`di2l_synth`: what it writes, what it says, what it leaves behind."
import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from di2l.synthetic.benchmark import read_benchmark, write_benchmark
from di2l.synthetic.sensors import VERSION, Settings

SMALL = dict(preset="tiny", identities=5, val_identities=2, test_identities=3, images=1, test_infrared=2, workers=1)
COMMAND = [sys.executable, "-c", "from di2l.commands import synth; synth()"]


def run(*words):
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)


def test_the_command_writes_a_benchmark(tmp_path):
    small = write_benchmark(tmp_path / "small", **SMALL)
    done = run(tmp_path / "b", *(f"--{k}={v}" for k, v in SMALL.items()), "--json", tmp_path / "about.json", "--seed", 0)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["content"] == read_benchmark(small)["content"] and about["settings"] == read_benchmark(small)["settings"]
    assert about["version"] == VERSION and set(about["settings"]) == set(asdict(Settings()))


@pytest.mark.parametrize("words, message", [
    (("--correlation", 2), "correlation = 2"), (("--preset", "giant"), "giant"), (("--silhouette", "perhaps"), "true or false"),
    (("--no_such_knob", 1), "no_such_knob"), (("--corelation", 1), "did you mean 'correlation'"),
])
def test_the_command_says_what_is_wrong(tmp_path, words, message):
    done = run(tmp_path / "b", *words)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "b").exists()


def test_the_command_has_help():
    done = run("--help")
    assert done.returncode == 0 and "--preset" in done.stdout and "--correlation" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_end_that_a_cluster_asks_for_leaves_nothing(tmp_path, workers):
    with subprocess.Popen([*COMMAND, str(tmp_path / "b"), "--workers", str(workers)], stderr=subprocess.DEVNULL) as program:
        while program.poll() is None and not list(tmp_path.rglob("*.jpg")): time.sleep(0.05)
        program.terminate()
        assert program.wait(60) == 143
    assert list(tmp_path.iterdir()) == []
