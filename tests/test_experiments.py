"Experiments: identities, records, the small run that is made again, the README's numbers, and the README's own command."
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from di2l import experiments as X
from di2l import synthetic
from di2l.datasets import UserError, read_sysu

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The small recorded run, made again from nothing."
    base = tmp_path_factory.mktemp("again")
    record = X.run("tiny", data=base / "data", runs=base / "runs", results=base / "results")
    return base, record


def test_small_record_is_made_again(made):
    "Same data to the byte; same numbers up to what another processor's rounding may do."
    record, again = X.recorded("tiny", results=ROOT / "results"), made[1]
    assert record, "results/runs/tiny-d0-s0.json is missing or stale: di2l_experiments make --only tiny"
    for key in ("identity", "config", "data_seed", "seed", "num_ids", "benchmark"):
        assert record[key] == again[key], key
    if record["versions"]["pillow"] == again["versions"]["pillow"]:
        assert record["data"] == again["data"]
    np.testing.assert_allclose(again["curve"]["focal"][0], record["curve"]["focal"][0], rtol=1e-3)
    np.testing.assert_allclose(again["curve"]["focal"], record["curve"]["focal"], rtol=0.1)
    for protocol, m in record["metrics"].items():
        for k in ("rank1", "rank10", "mAP"):
            assert again["metrics"][protocol][k] == pytest.approx(m[k], abs=0.08), (protocol, k)


def test_a_record_is_read_and_not_made_again(made, monkeypatch):
    monkeypatch.setattr(X, "trained", lambda *a, **k: pytest.fail("trained again"))
    assert X.run("tiny", data=made[0] / "data", runs=made[0] / "runs", results=made[0] / "results") == json.loads(
        X.record_path("tiny", 0, 0, made[0] / "results").read_text())


def test_record_holds_what_it_promises(made):
    r = made[1]
    assert {"identity", "config", "seed", "data_seed", "data", "device", "precision", "versions", "seconds", "metrics", "curve", "intra_modality", "confidence"} <= r.keys()
    assert r["metrics"][X.ALL_SEARCH]["trials"] and len(r["metrics"][X.ALL_SEARCH]["trials"]) == 10
    assert set(r["confidence"]) == {"visible", "infrared"} and len(r["curve"]["step"]) == r["config"]["steps"]
    assert sum(r["attention"]["mean"]) == pytest.approx(1, abs=1e-4) and 0 <= r["attention"]["saturated"] <= 1 and r["attention"]["images"] > 100
    text = json.dumps(r)
    assert str(made[0]) not in text and str(Path.home()) not in text, "a machine's path in a record"


def test_stale_records_are_not_read(made, monkeypatch):
    results = made[0] / "results"
    assert X.recorded("tiny", results=results)
    changed = replace(X.EXPERIMENTS["tiny"], settings=dict(X.EXPERIMENTS["tiny"].settings, steps=13))
    monkeypatch.setitem(X.EXPERIMENTS, "tiny", changed)
    assert X.recorded("tiny", results=results) is None


def test_a_gallery_is_missed_and_goes_stale_as_a_record_does(made, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(X, "GALLERIES", ("tiny",))
    (tmp_path / "runs").mkdir(); shutil.copy(X.record_path("tiny", 0, 0, made[0] / "results"), tmp_path / "runs")
    assert X.plan("tiny", tmp_path) == [("tiny", 0, 0)]
    with pytest.raises(UserError, match="not there; `make results`"): X.read_gallery("tiny", tmp_path)
    X.run("tiny", data=made[0] / "data", runs=made[0] / "runs", results=tmp_path)
    assert X.plan("tiny", tmp_path) == [] and X.read_gallery("tiny", tmp_path)["tiles"].ndim == 4
    path = tmp_path / "galleries" / "tiny.json"
    path.write_text(json.dumps(dict(json.loads(path.read_text()), identity="another")))
    assert X.plan("tiny", tmp_path) == [("tiny", 0, 0)]
    with pytest.raises(UserError, match="stale; `make results`"): X.read_gallery("tiny", tmp_path)


def test_a_notebook_makes_what_it_lacks_and_nothing_else(made, tmp_path, capsys):
    import shutil
    shutil.copytree(made[0] / "data", tmp_path / "data")
    X.complete("tiny", folder=tmp_path)
    first = X.record_path("tiny", 0, 0, tmp_path / "results").read_text()
    assert json.loads(first)["metrics"] == made[1]["metrics"]
    X.complete("tiny", folder=tmp_path)
    assert X.record_path("tiny", 0, 0, tmp_path / "results").read_text() == first and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", [f.name for f in fields(synthetic.Settings) if f.name not in ("layout",)])
def test_every_knob_changes_the_identity(name):
    e = X.EXPERIMENTS["di2l"]
    old = getattr(synthetic.PRESETS["default"], name)
    new = not old if isinstance(old, bool) else (old + 1 if isinstance(old, int) else old * 0.9 + 0.017)
    assert X.identity(replace(e, knobs={name: new}), 0, 0) != X.identity(e, 0, 0)


def test_generator_version_changes_the_identity(monkeypatch):
    before = X.identity(X.EXPERIMENTS["di2l"], 0, 0)
    monkeypatch.setattr(synthetic, "VERSION", "other")
    assert X.identity(X.EXPERIMENTS["di2l"], 0, 0) != before


def test_shuffling_permutes_images_within_each_camera(made):
    root = X.benchmark(X.EXPERIMENTS["tiny"], 0, made[0] / "data")
    before, after = read_sysu(root), read_sysu(X.shuffled(root))
    assert before.records.equals(after.records)
    content = lambda d: {p: (d.root / p).read_bytes() for p in d.records.path}
    a, b = content(before), content(after)
    moved = [p for p in a if a[p] != b[p]]
    assert set(moved) <= set(before.train.path) and len(moved) > 0.5 * len(before.train)
    for cam, rows in before.train.groupby("cam"):
        assert sorted(a[p] for p in rows.path) == sorted(b[p] for p in rows.path)


def test_held_out_runs_never_see_test_identities(made):
    from di2l.datasets import hold_out

    full = read_sysu(X.benchmark(X.EXPERIMENTS["tiny"], 0, made[0] / "data"))
    held = hold_out(full)
    assert not set(held.records.pid) & set(full.test.pid)
    assert set(held.test.pid) <= set(full.train.pid) and not set(held.test.pid) & set(held.train.pid)
    assert all(X.configuration(X.EXPERIMENTS[n], 0).hold_out for n in X.EXPERIMENTS if n.startswith("held-out-"))


def test_unknown_experiment_suggests_a_name():
    with pytest.raises(UserError, match="did you mean 'baseline'"):
        X.experiment("basline")


def test_making_goes_on_after_a_failure_and_knows_its_names(monkeypatch, tmp_path):
    made = []
    def run(name, **_):
        made.append(name)
        if len(made) == 2: raise ValueError("no")
    monkeypatch.setattr(X, "run", run); monkeypatch.setattr(X, "benchmark", lambda *_: None)
    failed = X.make("dpa,tiny", results=tmp_path)
    assert len(made) == len(X.plan("dpa,tiny", tmp_path)) > 3 and failed == [(made[1], "ValueError: no")]
    with pytest.raises(UserError, match="no experiment is called so"): X.make("typo", results=tmp_path)
    with pytest.raises(UserError, match="workers = 0"): X.make(workers=0, results=tmp_path)


def test_every_experiment_has_a_valid_configuration():
    for name, e in X.EXPERIMENTS.items():
        assert X.configuration(e, 0).method in X.model.METHODS
        replace(synthetic.PRESETS[e.benchmark], **e.knobs)
        assert name in X.PLAN, f"{name} is defined and never run"


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = np.mean([(lambda m, l, h: l <= 1 <= h)(*X.interval(rng.normal(1, 2, 6))) for _ in range(2000)])
    assert 0.93 < covered < 0.97


def test_readme_numbers_are_those_on_record():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- reproduce -->" in text and "<!-- table2 -->" in text
    assert X.fill_readme(text, ROOT / "results") == text, "README and records disagree: di2l_experiments readme"


def test_records_in_the_repository_are_fresh():
    "A record that no experiment can read any more is clutter."
    for path in sorted((ROOT / "results" / "runs").glob("*.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        assert path == X.record_path(r["name"], r["data_seed"], r["seed"], ROOT / "results")
        assert X.recorded(r["name"], r["data_seed"], r["seed"], ROOT / "results"), f"{path.name} is stale"


def test_reproduce_end_to_end(made, tmp_path, monkeypatch, capsys):
    "The README's command on the small benchmark: figures drawn, a table printed; the second call trains nothing."
    monkeypatch.setitem(X.EXPERIMENTS, "di2l", replace(X.EXPERIMENTS["tiny"], name="di2l"))
    args = dict(data=made[0] / "data", runs=tmp_path / "runs", results=ROOT / "results", figures=tmp_path / "figures")
    first = X.reproduce(**args)
    printed = capsys.readouterr().out
    assert all(p in printed for p in first["metrics"]) and "rank1" in printed
    drawn = {p.name: p.read_bytes() for p in (tmp_path / "figures").glob("*.png")}
    assert {"curves.png", "cmc.png", "retrieval_infrared_to_visible.png"} <= drawn.keys()
    monkeypatch.setattr(X.training, "train", lambda *a, **k: pytest.fail("trained again"))
    assert X.reproduce(**args) == first
    assert {p.name: p.read_bytes() for p in (tmp_path / "figures").glob("*.png")} == drawn


def test_commands(made, tmp_path):
    def di2l(*args): return subprocess.run([Path(sys.executable).parent / "di2l_experiments", *args], capture_output=True, text=True, cwd=tmp_path)

    good = di2l("status", "--only", "tiny", "--results", str(made[0] / "results"), "--json", "status.json")
    assert good.returncode == 0 and "tiny" in good.stdout, good.stderr
    assert {r["experiment"]: r["recorded"] for r in json.loads((tmp_path / "status.json").read_text())}["tiny"] == 1
    bad = di2l("mkae")
    assert bad.returncode == 1 and "expected make, status or readme" in bad.stderr and "Traceback" not in bad.stderr
