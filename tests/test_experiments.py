"Experiments: identities, records, galleries, the small run that is made again, and runs side by side that are stopped."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from di2l import experiments as X
from di2l.console import UserError
from di2l.data.cache import cache_images
from di2l.data.records import hold_out, read_sysu
from di2l.methods import spectra  # defines experiments too, as those that it imports
from di2l.results import code as C
from di2l.results.gallery import read_gallery
from di2l.results.record import record_path
from di2l.results.statistics import ALL_SEARCH, interval
from di2l.runs.folder import load_network
from di2l.synthetic.sensors import PRESETS, Settings

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
    for key in ("identity", "data_seed", "seed", "num_ids", "benchmark"):
        assert record[key] == again[key], key
    for key, value in record["config"].items():                        # settings that came later are not in it
        assert value == (again["config"][key] if key != "settings" else {k: again["config"][key][k] for k in value}), key
    if record["versions"]["pillow"] == again["versions"]["pillow"]:
        assert record["data"] == again["data"]
    np.testing.assert_allclose(again["curve"]["focal"][0], record["curve"]["focal"][0], rtol=1e-3)
    np.testing.assert_allclose(again["curve"]["focal"], record["curve"]["focal"], rtol=0.1)
    for protocol, m in record["metrics"].items():
        for k in ("rank1", "rank10", "mAP"):
            assert again["metrics"][protocol][k] == pytest.approx(m[k], abs=0.08), (protocol, k)


def test_a_record_is_read_and_not_made_again(made, monkeypatch):
    monkeypatch.setattr(X, "train", lambda *a, **k: pytest.fail("trained again"))
    assert X.run("tiny", data=made[0] / "data", runs=made[0] / "runs", results=made[0] / "results") == json.loads(
        record_path("tiny", 0, 0, made[0] / "results").read_text())


def test_record_holds_what_it_promises(made):
    r = made[1]
    assert {"identity", "config", "seed", "data_seed", "data", "device", "precision", "versions", "seconds",
            "metrics", "curve", "intra_modality", "confidence"} <= r.keys()
    assert r["metrics"][ALL_SEARCH]["trials"] and len(r["metrics"][ALL_SEARCH]["trials"]) == 10
    assert set(r["confidence"]) == {"visible", "infrared"} and len(r["curve"]["step"]) == r["config"]["steps"]
    looked = r["attention"]
    assert sum(looked["mean"]) == pytest.approx(1, abs=1e-4) and 0 <= looked["saturated"] <= 1 and looked["images"] > 100
    text = json.dumps(r)
    assert str(made[0]) not in text and str(Path.home()) not in text, "a machine's path in a record"


def test_stale_records_are_not_read(made, monkeypatch):
    results = made[0] / "results"
    assert X.recorded("tiny", results=results)
    changed = replace(X.EXPERIMENTS["tiny"], settings=dict(X.EXPERIMENTS["tiny"].settings, steps=13))
    monkeypatch.setitem(X.EXPERIMENTS, "tiny", changed)
    assert X.recorded("tiny", results=results) is None


def test_a_damaged_record_is_named(made, tmp_path):
    path = record_path("tiny", 0, 0, tmp_path)
    path.parent.mkdir()
    path.write_text(record_path("tiny", 0, 0, made[0] / "results").read_text()[:1000])
    for ask in (lambda: X.recorded("tiny", results=tmp_path), lambda: X.plan("tiny", tmp_path)):
        with pytest.raises(UserError, match=r"tiny-d0-s0\.json: is damaged .* delete it"):
            ask()


def test_a_gallery_is_missed_and_goes_stale_as_a_record_does(made, tmp_path, monkeypatch):
    monkeypatch.setattr(X, "GALLERIES", (("tiny", 0, 0),))
    (tmp_path / "runs").mkdir()
    shutil.copy(record_path("tiny", 0, 0, made[0] / "results"), tmp_path / "runs")
    assert X.plan("tiny", tmp_path) == [("tiny", 0, 0)]
    with pytest.raises(UserError, match="not there; `make results`"):
        read_gallery("tiny", tmp_path)
    X.run("tiny", data=made[0] / "data", runs=made[0] / "runs", results=tmp_path)
    gallery = read_gallery("tiny", tmp_path)
    assert X.plan("tiny", tmp_path) == [] and gallery["tiles"].ndim == 4
    path = tmp_path / "galleries" / "tiny.json"
    before = path.read_text()
    path.write_text(json.dumps(dict(json.loads(before), identity="another")))
    assert X.plan("tiny", tmp_path) == [("tiny", 0, 0)]
    with pytest.raises(UserError, match="stale; `make results`"):
        read_gallery("tiny", tmp_path)
    path.unlink()
    assert X.plan("tiny", tmp_path) == [("tiny", 0, 0)]


def test_pixel_attention_is_that_of_the_galleries_queries(made, tmp_path, monkeypatch):
    monkeypatch.setattr(X, "GALLERIES", (("tiny", 0, 0),))
    X.run("tiny", data=made[0] / "data", runs=tmp_path / "runs", results=tmp_path)
    queries = read_gallery("tiny", tmp_path)["directions"]["infrared→visible"]
    path = tmp_path / "galleries" / "tiny-pixel-attention.json"
    found = json.loads(path.read_text())
    assert list(found) == ["identity", "network", "tiles", "maps", "sizes"] and list(found["maps"]) == ["non_local2", "non_local3"]
    assert found["tiles"] == [q["query"] for q in queries] and found["identity"] == X.recorded("tiny", results=tmp_path)["identity"]
    for name, (h, w) in found["sizes"].items():
        maps = np.array(found["maps"][name])
        assert maps.shape == (len(queries), h * w, h * w) and h == 2 * w
        np.testing.assert_allclose(maps.sum(2), 1, atol=h * w * 5e-5)
    assert path.stat().st_size < 400e3


def test_a_notebook_makes_what_it_lacks_and_nothing_else(made, tmp_path, capsys):
    shutil.copytree(made[0] / "data", tmp_path / "data")
    X.complete("tiny", folder=tmp_path)
    first = record_path("tiny", 0, 0, tmp_path / "results").read_text()
    assert json.loads(first)["metrics"] == made[1]["metrics"]
    X.complete("tiny", folder=tmp_path)
    assert record_path("tiny", 0, 0, tmp_path / "results").read_text() == first and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", [f.name for f in fields(Settings) if f.name not in ("layout",)])
def test_every_knob_changes_the_identity(name):
    e = X.EXPERIMENTS["di2l"]
    old = getattr(PRESETS["default"], name)
    new = not old if isinstance(old, bool) else (old + 1 if isinstance(old, int) else old * 0.9 + 0.017)
    assert X._identity(replace(e, knobs={name: new}), 0, 0) != X._identity(e, 0, 0)


def test_generator_version_changes_the_identity(monkeypatch):
    before = X._identity(X.EXPERIMENTS["di2l"], 0, 0)
    monkeypatch.setattr(X, "VERSION", "other")
    assert X._identity(X.EXPERIMENTS["di2l"], 0, 0) != before


def test_an_edited_module_and_another_torch_make_a_record_stale(monkeypatch):
    "Of the runs that know their code: those whose outcome the module decides, by name; a change that was shown to change nothing does not."
    name = "search-part-unit"
    e, digests = X.EXPERIMENTS[name], {m: C._digest(m) for m in C.deciding_modules(X.METHODS["di2l"])}
    record = dict(name=name, data_seed=6, seed=0, identity=X._identity(e, 6, 0), code=X._code(e))
    assert X.stale(record) == []
    assert {"di2l.dpa", "di2l.train", "di2l.eval", "di2l.synthetic.people", "di2l.data.cache", "di2l.runs.process"} < set(digests)
    for edited in digests:
        monkeypatch.setattr(C, "_digest", lambda m: "edited" if m == edited else digests[m])
        assert X.stale(record) == [edited]
    after = C.code_digest(X._code(e))
    monkeypatch.setattr(X, "shown_equal", lambda: {after: C.code_digest(record["code"])})
    assert X.stale(record) == []
    monkeypatch.setattr(C, "_digest", digests.__getitem__)
    monkeypatch.setattr(C, "version", lambda name: "9.9.9+cpu")
    assert X.stale(record) == ["torch"]


def test_a_stale_record_says_which_setting_and_the_status_shows_it(monkeypatch, tmp_path):
    name = "search-free-w8-lr0.002"
    e = X.EXPERIMENTS[name]
    config = {k: v for k, v in json.loads(json.dumps(X.asdict(X._configuration(e, 0)))).items() if k != "root"}
    record = dict(name=name, data_seed=6, seed=0, identity=X._identity(e, 6, 0), code=X._code(e), config=config)
    record_path(name, 6, 0, tmp_path).parent.mkdir()
    record_path(name, 6, 0, tmp_path).write_text(json.dumps(record))
    assert X.recorded(name, 6, 0, tmp_path) == record
    monkeypatch.setitem(X.EXPERIMENTS, name, replace(e, settings={**e.settings, "lr": 0.5}))
    assert X.recorded(name, 6, 0, tmp_path) is None
    (row,) = X.status(tmp_path, name).to_dict("records")
    assert row["recorded"] == 0 and "lr was 0.002 and is 0.5" in row["stale"]


def test_a_docstring_decides_nothing_and_a_constant_does():
    source = Path(C._path("di2l.non_local")).read_text()
    assert C.source_digest(source) == C.source_digest(source.replace("Eq. 2–3: embedded-Gaussian", "An embedded-Gaussian").replace("# (B,N,N)", "#"))
    assert "= 8.0" in source or "else 8.0" in source
    assert C.source_digest(source) != C.source_digest(source.replace("8.0", "9.0"))


def test_shuffling_permutes_images_within_each_camera(made):
    e = X.EXPERIMENTS["tiny"]
    shuffled = X._benchmark(replace(e, control="shuffled"), 0, made[0] / "data")
    before, after = read_sysu(X._benchmark(e, 0, made[0] / "data")), read_sysu(shuffled)
    assert before.records.equals(after.records)
    content = lambda d: {p: (d.root / p).read_bytes() for p in d.records.path}
    a, b = content(before), content(after)
    moved = [p for p in a if a[p] != b[p]]
    assert set(moved) <= set(before.train.path) and len(moved) > 0.5 * len(before.train)
    for cam, rows in before.train.groupby("cam"):
        assert sorted(a[p] for p in rows.path) == sorted(b[p] for p in rows.path)


def test_a_record_names_data_that_were_read(made, tmp_path):
    "Other pixels under the same names: the hash in benchmark.json is not theirs."
    shutil.copytree(made[0] / "data", tmp_path / "data")
    image = next((tmp_path / "data" / "tiny-0").rglob("*.jpg"))
    noise = np.random.default_rng(0).integers(0, 256, (96, 48, 3), np.uint8)
    Image.fromarray(noise).save(image)
    with pytest.raises(UserError, match="its files are not those that were written"):
        X.run("tiny", data=tmp_path / "data", runs=tmp_path / "runs", results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_held_out_runs_never_see_test_identities(made):
    full = read_sysu(X._benchmark(X.EXPERIMENTS["tiny"], 0, made[0] / "data"))
    held = hold_out(full)
    assert not set(held.records.pid) & set(full.test.pid)
    assert set(held.test.pid) <= set(full.train.pid) and not set(held.test.pid) & set(held.train.pid)
    assert all(X._configuration(X.EXPERIMENTS[n], 0).hold_out for n in X.EXPERIMENTS if n.startswith("held-out-"))


def test_unknown_experiment_suggests_a_name():
    with pytest.raises(UserError, match="did you mean 'baseline'"):
        X._experiment("basline")


def test_making_goes_on_after_a_failure_and_knows_its_names(monkeypatch, tmp_path):
    made = []
    def run(name, *_, **__):
        made.append(name)
        if len(made) == 2:
            raise ValueError("no")
    monkeypatch.setattr(X, "run", run)
    monkeypatch.setattr(X, "_benchmark", lambda *_: None)
    failed = X.make("dpa,tiny", results=tmp_path)
    assert len(made) == len(X.plan("dpa,tiny", tmp_path)) > 3 and failed == [(made[1], "ValueError: no")]
    with pytest.raises(UserError, match="no experiment is called so"):
        X.make("typo", results=tmp_path)
    with pytest.raises(UserError, match="workers = 0"):
        X.make(workers=0, results=tmp_path)


def test_every_experiment_has_a_valid_configuration():
    for name, e in X.EXPERIMENTS.items():
        assert X._configuration(e, 0).method in X.METHODS
        replace(PRESETS[e.benchmark], **e.knobs)
        assert name in {**X.PLAN, **X.SEARCH}, f"{name} is defined and never run"


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = np.mean([(lambda m, l, h: l <= 1 <= h)(*interval(rng.normal(1, 2, 6))) for _ in range(2000)])
    assert 0.93 < covered < 0.97


def test_records_in_the_repository_are_fresh():
    "A record that no experiment can read any more is clutter."
    for path in sorted((ROOT / "results" / "runs").glob("*.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        assert path == record_path(r["name"], r["data_seed"], r["seed"], ROOT / "results")
        assert X.recorded(r["name"], r["data_seed"], r["seed"], ROOT / "results"), f"{path.name} is stale"


SMALL = dict(steps=150, size=(48, 24), ids=2, visible=2, infrared=2, device="cpu", precision="fp32", save_every=10**6)
MAKE = f"""
import sys
from pathlib import Path
from di2l import experiments as X

names = ("first", "second", "third")
for name in names:
    X.define(name, benchmark="tiny", settings={SMALL})
X.PLAN, X.SEARCH = dict.fromkeys(names, [(0, 0)]), dict()
base = Path(sys.argv[1])
print(X.make(workers=2, data=base / "data", runs=base / "runs", results=base / "results"))
"""


def processes(text):
    "Numbers of the processes whose environment or arguments hold a text, zombies left out."
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return sorted(set(found) - {os.getpid()})


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["ctrl-c", "SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_what_ends_make_ends_its_runs(made, tmp_path, how):
    "Each saves itself, nothing trains on, and the next make goes on from there."
    shutil.copytree(made[0] / "data", tmp_path / "data")
    (tmp_path / "make.py").write_text(MAKE)
    mark = f"DI2L_TEST={tmp_path}"

    def make():
        return subprocess.Popen([sys.executable, "make.py", tmp_path], cwd=tmp_path, start_new_session=True, text=True,
                                env={**os.environ, "DI2L_TEST": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def steps(name):
        logs = list((tmp_path / "runs").glob(f"{name}-*/log.csv"))
        return len(logs[0].read_text().splitlines()) - 1 if logs else 0

    started = make()
    try:
        wait_until(lambda: min(steps("first"), steps("second")) > 0, 120)
        assert len(processes(mark)) == 3
        if how == "ctrl-c":                                      # a terminal signals every process of its group
            os.killpg(started.pid, signal.SIGINT)
        else:
            started.send_signal(getattr(signal, how))
        started.communicate(timeout=60)
        wait_until(lambda: not processes(mark), 60)
    finally:
        for number in processes(mark):
            os.kill(number, signal.SIGKILL)
    assert started.returncode != 0 and steps("third") == 0
    assert 0 < max(steps("first"), steps("second")) < SMALL["steps"], "it finished before it was stopped; give it more steps"
    for name in ("first", "second"):                             # on its own it would never have saved itself
        assert len(list((tmp_path / "runs").glob(f"{name}-*/checkpoints/*"))) == 1
    if how != "SIGTERM":
        return
    again = make()
    said, errors = again.communicate(timeout=240)
    assert again.returncode == 0 and said.strip() == "[]", errors
    for name in ("first", "second", "third"):
        assert json.loads(record_path(name, 0, 0, tmp_path / "results").read_text())["config"]["steps"] == SMALL["steps"]
    assert not list((tmp_path / "runs").iterdir())
