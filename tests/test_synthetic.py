"The embedded benchmark: layouts, bytes, knobs, controls, mistakes."
import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings as limits, strategies as st

from di2l.console import UserError
from di2l.data.records import read_regdb, read_sysu
from di2l.eval import protocols
from di2l.synthetic import benchmark, people, sensors
from di2l.synthetic.benchmark import _cameras_of, _splits, read_benchmark, _settings_for, write_benchmark
from di2l.synthetic.people import _draw_colour, random_stream, _draw_person
from di2l.synthetic.sensors import LAYOUTS, PRESETS, Settings, render

SYSU, REGDB = LAYOUTS["sysu"], LAYOUTS["regdb"]

SMALL = dict(preset="tiny", identities=5, val_identities=2, test_identities=3, images=1, test_infrared=2, workers=1)
HALVES = dict(preset="regdb", identities=4, test_identities=4, images=2, test_visible=2, test_infrared=2, workers=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory): return write_benchmark(tmp_path_factory.mktemp("data") / "small", **SMALL)

@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return write_benchmark(tmp_path_factory.mktemp("data") / "tiny", preset="tiny", workers=2)

def left_behind(folder): return sorted(p.name for p in Path(folder).iterdir())


# --- layouts ------------------------------------------------------------------
def test_the_sysu_reader_reads_it(tiny):
    s, records = PRESETS["tiny"], read_sysu(tiny).records
    pids = records.groupby("split").pid.unique().map(set)
    assert {k: len(v) for k, v in pids.items()} == dict(train=s.identities - s.val_identities, val=s.val_identities, test=s.test_identities)
    assert not pids.train & pids.val and not (pids.train | pids.val) & pids.test
    for _, rows in records.groupby("pid"):
        assert (rows.groupby("modality").cam.nunique()[["visible", "infrared"]] >= [2, 1]).all()
    test = records[(records.split == "test") & (records.modality == "visible")]
    assert (test.groupby(["pid", "cam"]).size() >= 10).all()

def test_every_standard_protocol_can_be_laid_out(tiny):
    made = {(p.about["mode"], p.about["shots"]): p for p in protocols(read_sysu(tiny)) if "mode" in p.about}
    assert {("all", 1), ("all", 10), ("indoor", 1), ("indoor", 10)} <= set(made)
    records = read_sysu(tiny).records
    sizes = records.loc[made["all", 10].galleries[0]].groupby(["pid", "cam"]).size()
    assert (sizes == 10).all()

def test_some_identities_are_missing_from_some_cameras(tmp_path):
    s = replace(PRESETS["default"], missing=0.3)
    seen = [len(_cameras_of(s, 0, pid)) for pid in range(300)]
    assert min(seen) >= 3 and abs(np.mean(seen) / 6 - 0.7) < 0.05
    assert all(len(_cameras_of(replace(s, missing=0.0), 0, pid)) == 6 for pid in range(20))

def test_the_regdb_reader_reads_it(tmp_path):
    root = write_benchmark(tmp_path / "r", **HALVES)
    halves = set()
    for trial in range(1, 11):
        d = read_regdb(root, trial)
        assert set(d.train.pid).isdisjoint(d.test.pid) and len(d.records) == 2 * 8 * 2
        halves.add(tuple(sorted(set(d.train.pid))))
    assert len(halves) > 3
    assert read_benchmark(root, deep=True)["images"] == 32

def test_cameras_2_and_3_share_a_place():
    by = {c.number: c for c in SYSU}
    assert by[2].place == by[3].place and len({c.place for c in SYSU}) == 5
    assert [c.number for c in SYSU if c.infrared] == [3, 6]


# --- bytes --------------------------------------------------------------------
def test_processes_do_not_change_a_byte(small, tmp_path):
    one = write_benchmark(tmp_path / "again", **SMALL)
    two = write_benchmark(tmp_path / "two", **{**SMALL, "workers": 2})
    files = sorted(p.relative_to(small) for p in small.rglob("*") if p.is_file())
    for other in one, two:
        assert sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file()) == files
        assert all((small / f).read_bytes() == (other / f).read_bytes() for f in files)
    assert read_benchmark(two, deep=True)["content"] == read_benchmark(small)["content"]

def test_another_seed_is_another_benchmark(small, tmp_path):
    assert read_benchmark(write_benchmark(tmp_path / "o", seed=1, **SMALL))["content"] != read_benchmark(small)["content"]

@limits(max_examples=8)
@given(st.integers(1, 99), st.sampled_from(SYSU + REGDB), st.integers(1, 99))
def test_an_image_depends_on_its_arguments_alone(pid, camera, frame):
    s = PRESETS["regdb"] if camera in REGDB else PRESETS["hard"]
    first = render(s, 3, pid, camera, frame)
    for cached in (_draw_person, sensors._place, sensors._optics): cached.cache_clear()
    render(s, 3, pid + 1, camera, frame)
    assert np.array_equal(first, render(s, 3, pid, camera, frame))
    assert first.shape == (s.height, s.width, 3) and first.dtype == np.uint8

PIXELS = """
import hashlib
from di2l.synthetic.sensors import LAYOUTS, PRESETS, render
h = hashlib.sha256()
for pid in range(1, 7):
    for cam in LAYOUTS["sysu"]: h.update(render(PRESETS["hard"], 0, pid, cam, 1))
    for cam in LAYOUTS["regdb"]: h.update(render(PRESETS["regdb"], 0, pid, cam, 1))
print(h.hexdigest())
"""

def test_the_processor_s_vector_width_does_not_change_a_bit():
    features = [f for f, on in np._core._multiarray_umath.__cpu_features__.items() if on]
    optional = [f for f in np._core._multiarray_umath.__cpu_dispatch__ if f in features]
    if not optional: pytest.skip("numpy has nothing to switch off on this processor")
    narrow = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(optional)}
    runs = [subprocess.run([sys.executable, "-c", PIXELS], env=env, capture_output=True, text=True, check=True).stdout for env in (os.environ, narrow)]
    assert runs[0] == runs[1] and len(runs[0]) == 65


# --- knobs --------------------------------------------------------------------
CHANGED = dict(height=128, width=64, missing=0.4, correlation=0.2, ir_noise=3.0, ir_resolution=0.5, heading=180.0, nuisance=0.3, occlusion=1.0, silhouette=True, quality=60,
               identities=6, val_identities=1, test_identities=4, images=2, test_visible=11, test_infrared=1)

@pytest.mark.parametrize("knob", sorted(CHANGED))
def test_every_knob_changes_something(knob, small, tmp_path):
    s = replace(_settings_for("tiny", **{k: v for k, v in SMALL.items() if k not in ("preset", "workers")}), **{knob: CHANGED[knob]})
    if knob in ("identities", "val_identities", "test_identities", "missing"):
        before = json.loads((small / "benchmark.json").read_text())["settings"]
        old = Settings(**before)
        seen = lambda s: [[c.number for c in _cameras_of(s, 0, p)] for p in range(1, 9)]
        assert _splits(s, 0) != _splits(old, 0) or seen(s) != seen(old)
    else:
        pid, test = _splits(s, 0)["test" if knob.startswith("test") else "train"][0], knob.startswith("test")
        done = dict(benchmark._write_identity(tmp_path, s, 0, (pid, test)))
        old = {p.relative_to(small).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in small.glob(f"cam*/{pid:04d}/*.jpg")}
        assert done != old
        if knob in ("correlation", "ir_noise", "ir_resolution"):  # the infrared side alone
            assert all(done[n] == old[n] for n in done if not n.startswith(("cam3", "cam6")))
            assert all(done[n] != old[n] for n in done if n.startswith(("cam3", "cam6")))

def test_all_knobs_are_known_and_documented():
    from fastcore.docments import docments
    assert set(CHANGED) | {"layout"} == {f.name for f in fields(Settings)}
    assert all(docments(Settings)[f.name] for f in fields(Settings))
    for name, s in PRESETS.items(): assert _settings_for(name) == s

@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.75, 1.0])
def test_correlation_is_that_of_infrared_with_luminance(correlation):
    rng = random_stream(0, 77)
    colours = [_draw_colour(rng) for _ in range(4000)]
    seen = np.sqrt([float((c * people.LUMINANCE).sum()) for c in colours])
    infrared = np.sqrt([people._near_infrared(c, correlation, rng) for c in colours])
    assert abs(np.corrcoef(seen, infrared)[0, 1] - correlation) < 0.05

def test_patterns_can_be_seen_in_both_spectra():
    crowd = [_draw_person(0, pid, 0.75) for pid in range(1, 101)]
    slots = [m for m in range(people.SLOTS) if m not in (people.SKIN, people.HAIR)]
    visible = np.array([[abs(people._tone(p.rgb[0, m]) - people._tone(p.rgb[1, m])) for m in slots] for p in crowd])
    infrared = np.array([[abs(p.nir[0, m] ** .5 - p.nir[1, m] ** .5) for m in slots] for p in crowd])
    assert np.mean(visible >= 0.25) > 0.97 and np.mean(infrared >= 0.15) > 0.97

def test_infrared_has_no_colour_and_visible_has():
    for cam in SYSU:
        image = render(PRESETS["default"], 0, 1, cam, 1).astype(int)
        assert (np.ptp(image, axis=2).max() == 0) == cam.infrared

def test_thermal_sees_warmth_and_a_pattern_by_the_sun_alone():
    calm, same = replace(PRESETS["regdb"], nuisance=0.0, ir_noise=0.0, occlusion=0.0), {}
    for correlation in (0.0, calm.correlation):
        calm = replace(calm, correlation=correlation)
        a = render(calm, 0, 1, REGDB[1], 1)
        person = _draw_person(0, 1, correlation)
        kept = person.pattern.copy()
        try: person.pattern[:, 0] = people.CHECKS; b = render(calm, 0, 1, REGDB[1], 1)
        finally: person.pattern[:] = kept
        same[correlation] = np.array_equal(a, b)
    assert list(same.values()) == [True, False]
    heat = _draw_person(0, 1, 0.0).heat                  # without the sun on it
    assert (heat[:, people.SKIN] > heat[:, people.UPPER]).all() and (heat[:, people.UPPER] > heat[:, people.BAG]).all() and (heat[0] == heat[1]).all()
    seen, sun = np.sqrt(person.rgb @ people.LUMINANCE), person.heat - heat
    assert np.corrcoef(seen[:, people.HAT:].ravel(), sun[:, people.HAT:].ravel())[0, 1] < -0.999 and not sun[:, :people.HAT].any()

def test_a_silhouette_hides_everything_but_the_outline():
    flat = replace(PRESETS["default"], silhouette=True, nuisance=0.0, occlusion=0.0, missing=0.0)
    scene = sensors._stage(flat, 0, 1, SYSU[0], random_stream(0, 5, 1, 1, 1))
    light = np.ones(len(scene.surface.pixels), np.float32)
    for name in ("rgb", "nir", "heat"):
        image = sensors._develop(scene, name, True, light, 1, np.float32(0), 0)    # nothing but bodies
        assert len(np.unique(image[image > 0])) <= 4 and image.max() in (np.float32(.25), 28)     # corners of 1 … 4 of 4
        assert len(np.unique(sensors._develop(scene, name, False, light, 1, np.float32(0), 0))) > 4


# --- controls that need no training --------------------------------------------
def rank1(query, gallery, q_pids, g_pids):
    dist = ((query[:, None] - gallery[None]) ** 2).sum(2)
    return float(np.mean(g_pids[dist.argmin(1)] == q_pids))

def histogram(image, bins=8):
    image = image.astype(int) * bins // 256
    return np.concatenate([np.bincount(image[..., c].ravel(), minlength=bins) for c in range(3)]) / image[..., 0].size

@pytest.fixture(scope="module")
def faces():
    "Two images of each of 40 people at every camera."
    s = PRESETS["default"]
    return {cam.number: np.stack([[render(s, 0, pid, cam, f) for f in (1, 2)] for pid in range(1, 41)]) for cam in SYSU}

@pytest.mark.parametrize("feature", ["mean colour", "luminance histogram", "colour histogram"])
def test_colour_alone_does_not_match_across_modalities(faces, feature):
    of = {"mean colour": lambda i: i.reshape(-1, 3).mean(0) / 255, "luminance histogram": lambda i: histogram(i.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8)), "colour histogram": histogram}[feature]
    table = {cam: np.stack([[of(i) for i in pair] for pair in images]) for cam, images in faces.items()}
    pids = np.arange(40)
    across = [rank1(table[q][:, f], table[g][:, 0], pids, pids) for q in (3, 6) for g in (1, 2, 4, 5) for f in (0, 1)]
    assert np.mean(across) < 3 / 40
    within = np.mean([rank1(table[c][:, 1], table[c][:, 0], pids, pids) for c in (1, 2, 4, 5)])
    if feature == "colour histogram": assert within > 2 / 40

def test_people_can_be_told_apart_in_the_pixels(faces):
    "Within a visible camera, colour in six stripes names the person far above chance."
    stripes = lambda i: np.concatenate([p.reshape(-1, 3).mean(0) for p in np.array_split(i[:, 12:36].astype(float), 6)]) / 255
    table = np.stack([[stripes(i) for i in pair] for pair in faces[4]])
    assert rank1(table[:, 1], table[:, 0], np.arange(40), np.arange(40)) > 0.2


# --- folders --------------------------------------------------------------------
def test_the_same_again_is_left_alone(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert write_benchmark(small, **SMALL) == small
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before

def test_another_configuration_is_never_overwritten(small):
    before = read_benchmark(small)
    with pytest.raises(UserError, match="correlation = 0.85 there, 0.5 wanted.*another folder or delete"): write_benchmark(small, **{**SMALL, "correlation": 0.5})
    with pytest.raises(UserError, match="seed = 0 there, 1 wanted"): write_benchmark(small, seed=1, **SMALL)
    assert read_benchmark(small, deep=True) == before

def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="expected a benchmark that di2l_synth wrote"): write_benchmark(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words" and left_behind(tmp_path) == ["mine"]

def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "new").mkdir()
    assert read_benchmark(write_benchmark(tmp_path / "new", **SMALL))["seed"] == 0
    assert left_behind(tmp_path) == ["new"]

def test_a_link_to_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "real").mkdir(); (tmp_path / "link").symlink_to(tmp_path / "real")
    write_benchmark(tmp_path / "link", **SMALL)
    assert (tmp_path / "real" / "benchmark.json").exists() and left_behind(tmp_path) == ["link", "real"]

def test_a_wide_image_can_be_made(tmp_path):
    write_benchmark(tmp_path / "wide", **{**SMALL, "height": 32, "width": 512})

def test_a_lost_or_changed_image_is_noticed(tmp_path):
    root = write_benchmark(tmp_path / "b", **SMALL)
    image = next(root.glob("cam1/*/*.jpg")); data = image.read_bytes()
    image.write_bytes(data[:-1])
    with pytest.raises(UserError, match="not those that were written"): read_benchmark(root, deep=True)
    image.unlink()
    with pytest.raises(UserError, match="delete the folder and write it again"): write_benchmark(root, **SMALL)
    (root / "benchmark.json").write_text("{")
    with pytest.raises(UserError, match="damaged"): write_benchmark(root, **SMALL)

def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(UserError, match="is a file"): write_benchmark(tmp_path / "f", **SMALL)
    with pytest.raises(UserError, match="give a folder that can be written"): write_benchmark(tmp_path / "f" / "below", **SMALL)

def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*a, **k): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(benchmark.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match="Permission denied.*can be written"): write_benchmark(tmp_path / "b", **SMALL)
    assert left_behind(tmp_path) == []

@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("bug")])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, workers, fault):
    whole, count = benchmark._encode, []
    def encode(*a):
        count.append(1)
        if len(count) > 7: raise fault
        return whole(*a)
    monkeypatch.setattr(benchmark, "_encode", encode)
    with pytest.raises(UserError if isinstance(fault, OSError) else RuntimeError): write_benchmark(tmp_path / "b", **{**SMALL, "workers": workers})
    assert left_behind(tmp_path) == []

def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(benchmark, "_lists", stop)
    with pytest.raises(KeyboardInterrupt): write_benchmark(tmp_path / "b", **SMALL)
    assert left_behind(tmp_path) == []

@pytest.mark.parametrize("knobs, message", [
    (dict(preset="giant"), "preset = 'giant'; there are tiny, default, hard, regdb"),
    (dict(identities=0, val_identities=0), "identities = 0: expected a number from 2"),
    (dict(correlation=1.5), "correlation = 1.5: expected a number from 0 to 1"), (dict(correlation=float("nan")), "correlation = nan"),
    (dict(correlation="much"), "correlation = 'much' is not a number"),
    (dict(test_visible=4), "test_visible = 4: expected a number from 10 to 1000"),
    (dict(val_identities=300), "val_identities = 300: expected a number from 1 to 299"),
    (dict(missing=0.9), "missing = 0.9"), (dict(corelation=0.5), "did you mean 'correlation'"),
    (dict(images=2.5), "is not a whole number"), (dict(silhouette=3), "is not true or false"),
    (dict(preset="regdb", images=5), "give equal numbers"),
    (dict(preset="regdb", identities=5), "give equal numbers"),
    (dict(layout="llcm"), "layout = 'llcm'; there are sysu, regdb"),
    (dict(seed=-1), "seed = -1"), (dict(seed=2 ** 32), "seed = 4294967296"), (dict(seed=0.5), "seed = 0.5"),
    (dict(height=4), "height = 4"), (dict(quality=100), "quality = 100"),
    (dict(workers=0), "workers = 0"),
])
def test_impossible_knobs(tmp_path, knobs, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")): write_benchmark(tmp_path / "b", **knobs)
    assert left_behind(tmp_path) == []
