"`di2l_eval` and `di2l_search` as a shell sees them."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("di2l.commands")
from di2l.console import UserError
from test_eval import nan_rows, run, table, tiny  # fixtures


def command(name, *args):
    code = f"import sys; sys.argv[0] = '{name}'; from di2l.commands import {name}; {name}()"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env)


def test_eval_command(run, table, tmp_path):
    done = command("evaluate", "--run", run, "--shots", 1, "--device", "cpu", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert "rank-1" in done.stdout and "indoor" in done.stdout and "infrared→visible" in done.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["results"]) == 2 and len(found["trials"]) == 10 and 0 <= found["rank1"] <= found["rank10"] <= found["rank20"] <= 1
    assert {r["about"]["mode"] for r in found["results"]} == {"all", "indoor"} and found["about"]["flip"] is False
    bad = command("evaluate", "--features", table(features=nan_rows(table.good["features"], 2)))
    assert bad.returncode == 1 and bad.stdout == "" and "Traceback" not in bad.stderr and len(bad.stderr.strip().splitlines()) == 1 and "NaN" in bad.stderr


def test_an_option_that_would_do_nothing_is_refused(table, run):
    from di2l.commands import evaluate
    f = table()
    for given in (dict(features=f, gallery=f, mode="indoor"), dict(features=f, gallery=f, shots=10), dict(features=f, flip=True), dict(features=f, root="x"), dict(features=f, skip="sysu"),
                  dict(features=f, protocol="llcm", mode="all"), dict(features=f, protocol="regdb", trials=2), dict(run=str(run), trials=2), dict(run=str(run), protocol="llcm")):
        with pytest.raises(UserError, match="does nothing with"): evaluate(**given)
    for given, said in ((dict(run=str(run), shots=0), "no protocol with .*shots.*0"), (dict(features=f, seed=-1), "seed = -1"), (dict(features=f, trials=0), "trials = 0"), (dict(run="nowhere"), "not a finished run")):
        with pytest.raises(UserError, match=said): evaluate(**given)


def test_another_dataset_of_the_same_name_is_not_scored(run, tiny, tmp_path, monkeypatch):
    "A run that was trained on `data`, asked from a folder with a `data` of its own, and from one with none."
    from di2l.commands import evaluate, search
    from di2l.data.cache import cache_images
    from di2l.retrieval.features import data_digest
    from di2l.synthetic.benchmark import write_benchmark
    shutil.copytree(run, tmp_path / "run")
    about = json.loads((run / "config.json").read_text())
    about["config"]["root"], about["dataset"] = "data", dict(digest=data_digest(tiny[0], cache_images(tiny[0], (96, 48))))
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    places = {name: tmp_path / name for name in ("right", "wrong", "none")}
    for place in places.values(): place.mkdir()
    shutil.copytree(tiny[0].root, places["right"] / "data")
    write_benchmark(places["wrong"] / "data", preset="tiny", seed=5)
    for place, said in (("right", None), ("wrong", "data has changed since this run was trained"), ("none", "is no folder seen from here; give --root")):
        monkeypatch.chdir(places[place])
        for command in evaluate, search:
            if not said: command(run=tmp_path / "run", device="cpu")
            else:
                with pytest.raises(UserError, match=said): command(run=tmp_path / "run", device="cpu")


def test_a_wrong_key_of_config_json_is_named(run, tmp_path):
    from di2l.commands import evaluate, search
    shutil.copytree(run, tmp_path / "run")
    file, whole = tmp_path / "run" / "config.json", json.loads((run / "config.json").read_text())
    def change(part, **values): return {**whole, part: {k: v for k, v in {**whole[part], **values}.items() if v is not ...}}
    for found, said in ((change("config", root=...), "key 'root' is missing"), (change("config", sise=1), "'sise'; did you mean 'size'"), (change("config", size="big"), "size = 'big'"),
                        (change("method", dpaa=True), "'dpaa'; did you mean 'dpa'"), (change("method", name="dl2i"), "there are di2l"), ({**whole, "nun_ids": 3}, "did you mean 'num_ids'"),
                        ({}, "key 'config' is missing"), ([], "is damaged")):
        file.write_text(json.dumps(found))
        for command in evaluate, search:
            with pytest.raises(UserError, match=f"config.json: .*{said}"): command(run=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    done = command("search", "--run", run, "--limit", 4, "--k", 5, "--device", "cpu", "--html", folder / "page.html", "--json", folder / "found.json")
    assert done.returncode == 0, done.stderr
    return folder / "page.html", json.loads((folder / "found.json").read_text())


def test_search_command(page, run, tiny, tmp_path):
    html, found = page
    text = html.read_text()
    assert len(found) == 20 and [r["rank"] for r in found[:5]] == [1, 2, 3, 4, 5]
    assert all(r["right"] == (r["pid"] == r["query_pid"]) for r in found)
    assert not any(r["query_cam"] == 3 and r["cam"] == 2 for r in found)
    assert text.count('class="result') == 20 and "http" not in text
    data = tiny[0]
    first = Path(data.root) / data.test.path.iloc[-1]
    lone = command("search", "--run", run, "--query", first, "--gallery", Path(data.root) / "cam1", "--k", 3, "--device", "cpu", "--html", tmp_path / "p.html")
    same = command("search", "--run", run, "--modality", "visible", "--gallery_modality", "visible", "--limit", 3, "--k", 2, "--device", "cpu", "--json", tmp_path / "same.json")
    assert same.returncode == 0 and all(r["path"] != r["query_path"] for r in json.loads((tmp_path / "same.json").read_text()))
    folder = sorted((Path(data.root) / "cam1").iterdir())[0]
    own = command("search", "--run", run, "--query", folder, "--gallery", Path(data.root) / "cam1", "--modality", "visible", "--gallery_modality", "visible", "--k", 2, "--device", "cpu", "--json", tmp_path / "own.json")
    hits = json.loads((tmp_path / "own.json").read_text())                       # no skip rule here: an image would find itself first
    assert own.returncode == 0 and hits and all(r["path"] != r["query_path"] for r in hits) and {r["rank"] for r in hits} == {1, 2}
    for words in (("--k", 0), ("--limit", 0), ("--gallery_modality", "foo")): assert words[0][2:] + " = " in command("search", "--run", run, *words).stderr
    assert lone.returncode == 0 and "unknown" in (tmp_path / "p.html").read_text()
    bad = command("search", "--run", run, "--query", tmp_path / "none.jpg")
    assert bad.returncode == 1 and "no such file" in bad.stderr and "Traceback" not in bad.stderr
