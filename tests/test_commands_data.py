"The command line of the dataset checker."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from standins import cut


def command(*args): return subprocess.run([sys.executable, "-c", "from di2l.commands import verify; verify()", *map(str, args)], capture_output=True, text=True)


def test_verify_on_the_command_line(copy, tmp_path):
    root = copy("sysu")
    file = cut(root)
    done = command("sysu", root, "--deep", "--json", tmp_path / "report.json")
    assert done.returncode == 1 and str(file) in done.stdout and "Traceback" not in done.stderr and "WRONG" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["ok"] is False and report["problems"][0]["file"] == str(file) and "damaged" in report["problems"][0]["problem"]
    (root / "benchmark.json").write_text("{}")
    file.write_bytes((root / "cam4" / file.relative_to(root / "cam1")).read_bytes()) if (root / "cam4" / file.relative_to(root / "cam1")).exists() else shutil.copy(next(root.glob("cam4/*/*.jpg")), file)
    done = command("sysu", root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "complete and readable" in done.stdout and "benchmark.json: a program made these images" in done.stdout


def test_a_name_that_is_no_utf8_is_reported_too(copy, tmp_path):
    root = copy("sysu")
    try: Path(os.fsdecode(os.fsencode(root / "cam1") + b"/caf\xe9.jpg")).write_bytes(b"")
    except OSError: pytest.skip("this system takes UTF-8 names only")
    done = command("sysu", root, "--json", tmp_path / "report.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert any(p["file"].endswith("caf\udce9.jpg") for p in json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["problems"])


def test_mistakes_on_the_command_line_are_one_line(tmp_path):
    for args in (["sysu", tmp_path / "none"], ["market", tmp_path], ["sysu", tmp_path]):
        done = command(*args)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert command("--help").returncode == 0 and command().returncode != 0
