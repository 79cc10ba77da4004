"The command `di2l_train`, as a shell sees it."
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from di2l import model
from di2l.runs.config import Config
from di2l.synthetic.benchmark import write_benchmark

COMMAND = [sys.executable, "-c", "from di2l.commands import train; train()"]
ALONE = dict(os.environ, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    "What makes a run on the smallest embedded benchmark that takes a second."
    root = write_benchmark(tmp_path_factory.mktemp("data") / "tiny", preset="tiny")
    changes = dict(root=root, size="48x24", parts=3, ids=4, visible=2, infrared=2, device="cpu", steps=2)
    return [word for name, value in changes.items() for word in (f"--{name}", str(value))]


def shell(*words, command=COMMAND):
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, env=ALONE)


def test_it_trains_says_what_and_writes_the_summary(words, tmp_path):
    done = shell("--preset", "quick", "--out", tmp_path / "run", "--json", tmp_path / "s.json", "--gamma", "0", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["steps"] == 2
    assert "di2l.gamma 0.0" in done.stdout and "1 process" in done.stdout and "model.safetensors" in done.stdout
    again = shell("--preset", "quick", "--out", tmp_path / "run", "--gamma", "0", *words)
    assert again.returncode == 1 and "holds a run already" in again.stderr
    assert shell("--preset", "quick", "--out", tmp_path / "run", "--gamma", "0", "--resume", *words).returncode == 0


def test_quick_is_the_preset_that_is_meant(words, tmp_path):
    assert "precision" in shell("--out", tmp_path / "run", *words).stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["optimiser"] == "adamw"


@pytest.mark.parametrize("wrong", [["--gama", "0"], ["--preset", "quik"], ["--root", "nowhere"], ["0.1"]],
                         ids=lambda w: w[0])
def test_a_mistake_is_one_line(words, tmp_path, wrong):
    done = shell("--out", tmp_path / "run", *words, *wrong)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_home_is_expanded(words, tmp_path):
    done = subprocess.run([*COMMAND, "--out=~/run", *words], env={**ALONE, "HOME": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "~").exists()


STOPPED = """
import os
from di2l import train as T
from di2l.commands import train
step = T.Run.one_step
def stopped(run):
    if run.step == 3: os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    step(run)
T.Run.one_step = stopped
train()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_command_says_so_in_its_status(words, tmp_path, number):
    words = ["--out", str(tmp_path / "run"), *words, "--steps", "9"]
    done = subprocess.run([sys.executable, "-c", STOPPED, *words], capture_output=True, text=True,
                          env={**ALONE, "SIGNAL": str(int(number))})
    assert done.returncode == 128 + number, done.stderr
    assert f"{number.name}: stopped after step 4 of 9" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert shell(*words, "--resume").returncode == 0


def test_a_log_that_was_changed_is_said(words, tmp_path):
    words, log = ["--out", str(tmp_path / "run"), *words, "--steps", "9"], tmp_path / "run" / "log.csv"
    subprocess.run([sys.executable, "-c", STOPPED, *words], capture_output=True, env={**ALONE, "SIGNAL": str(int(signal.SIGTERM))})
    log.write_text(log.read_text().replace("0.00", "0.01", 1))
    done = shell(*words, "--resume")
    assert done.returncode == 0 and done.stderr == f"warning: {log} was changed or cut; scalars of earlier steps are lost or wrong\n"


def test_nohup_trains_on_and_a_closed_terminal_saves(words, tmp_path):
    "The terminal's own SIGHUP: two of them, and nothing can be written to it any more."
    import pty
    words = [sys.executable, "-c", STOPPED, "--out", str(tmp_path / "run"), *words, "--steps", "9"]
    hung_up = {**ALONE, "SIGNAL": str(int(signal.SIGHUP))}
    done = subprocess.run(["nohup", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=hung_up, text=True)
    assert done.returncode == 0 and (tmp_path / "run" / "summary.json").exists(), done.stderr
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    process, terminal = pty.fork()                                            # a session of its own
    if not process: os.execve(words[0], [*words, "--steps", "100000"], {**ALONE, "SIGNAL": "0"})
    log = tmp_path / "other" / "log.csv"
    for _ in range(600):
        if log.exists() and log.read_bytes().count(b"\n") > 2: break
        time.sleep(0.1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert len(list((tmp_path / "other" / "checkpoints").glob("step-*"))) == 1


def test_a_warning_is_one_plain_line(words, tmp_path):
    warn = "from di2l import train as T; import warnings; old = T.Run.fit\ndef fit(r): warnings.warn('odd,\\nbut well'); old(r)\nT.Run.fit = fit"
    done = shell("--out", tmp_path / "run", *words, command=[sys.executable, "-c", f"{warn}\nfrom di2l.commands import train; train()"])
    assert done.returncode == 0 and done.stderr == "warning: odd, but well\n"


def test_help_names_every_option():
    done = shell("--help")
    assert done.returncode == 0
    for f in (*fields(Config), *fields(model.DI2LMethod)):
        assert f"--{f.name} " in done.stdout or f.name == "settings"
    for name in "preset", "out", "resume", "json": assert f"--{name}" in done.stdout


def test_a_person_at_a_terminal_sees_terms_accuracy_speed_and_time_left(words, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 250, 0, 0))      # a wide window
    words = [*COMMAND, "--out", str(tmp_path / "run"), *words, "--steps", "30"]
    child = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=ALONE)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536): seen += part
    except OSError: pass                                                      # the program has ended
    assert child.wait() == 0
    seen = seen.decode()
    bars = [line for line in re.split(r"[\r\n]", seen) if "/30 [" in line]
    assert re.search(r"\d+/30 \[\d\d:\d\d<\d\d:\d\d", bars[-1]), seen           # steps, time so far, time left
    for word in ("focal", "wrt", "accuracy", "images/s"): assert word in bars[-1], bars[-1]
    assert str(tmp_path / "run") in seen.split(bars[-1])[-1]                  # and in the end where everything is
