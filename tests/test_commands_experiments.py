"The README's numbers, and the commands `di2l_experiments` and `di2l_reproduce`."
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from di2l import experiments as X
from di2l.commands import reproduce
from di2l.results.readme import fill_readme

ROOT = Path(__file__).resolve().parents[1]


def test_readme_numbers_are_those_on_record():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- reproduce -->" in text and "<!-- table2 -->" in text
    assert fill_readme(text, ROOT / "results") == text, "README and records disagree: di2l_experiments readme"


def test_reproduce_end_to_end(tmp_path, monkeypatch, capsys):
    "The README's command on the small benchmark: figures drawn, a table printed; the second call trains nothing."
    monkeypatch.setitem(X.EXPERIMENTS, "table2-di2l", replace(X.EXPERIMENTS["tiny"], name="table2-di2l"))
    args = dict(data=tmp_path / "data", runs=tmp_path / "runs", results=ROOT / "results", figures=tmp_path / "figures")
    first = reproduce(**args)
    printed = capsys.readouterr().out
    assert all(p in printed for p in first["metrics"]) and "rank-1" in printed and "on record" not in printed
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "figures").glob("*.png")}
    assert {"curves.png", "retrieval_infrared_to_visible.png"} <= drawn.keys()
    monkeypatch.setattr(X, "train", lambda *a, **k: pytest.fail("trained again"))
    assert reproduce(**args) == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "figures").glob("*.png")} == drawn


def test_commands(tmp_path):
    def di2l(*args):
        program = "from di2l.commands import experiments; experiments()"
        return subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, cwd=tmp_path)

    good = di2l("status", "--only", "tiny", "--results", str(ROOT / "results"), "--json", "status.json")
    assert good.returncode == 0 and "tiny" in good.stdout, good.stderr
    status = {r["experiment"]: r["recorded"] for r in json.loads((tmp_path / "status.json").read_text())}
    assert status["tiny"] == 1
    bad = di2l("mkae")
    assert bad.returncode == 1 and "did you mean 'make'" in bad.stderr and "Traceback" not in bad.stderr
