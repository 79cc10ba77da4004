"Which images are queries, which are the gallery: the protocols of the three datasets."
import numpy as np
import pandas as pd
import pytest

from di2l.console import UserError
from di2l.data.records import hold_out, read_regdb
from di2l.eval import (
    DIRECTIONS, draw_gallery, evaluate_protocol, llcm_protocol, protocols, read_permutations, regdb_protocol, sysu_protocol)
from standins import read, sysu_counts


def test_sysu_galleries_have_their_shots_of_each_identity_and_camera(bases):
    r = read("sysu", bases["sysu"]).records
    for mode, cams in (("all", {1, 2, 4, 5}), ("indoor", {1, 2})):
        for shots in 1, 10:
            p = sysu_protocol(r, mode, shots)
            assert (r.split[p.query] == "test").all() and set(r.cam[p.query]) == {3, 6} and len(p.query) == ((r.split == "test") & r.cam.isin([3, 6])).sum()
            pool = r[(r.split == "test") & r.cam.isin(cams)]
            for g in p.galleries:
                have, could = r.loc[g].groupby(["pid", "cam"]).size(), pool.groupby(["pid", "cam"]).size()
                assert (have == could.clip(upper=shots)).all() and len(set(g)) == len(g)
            assert len(p.galleries) == 10 and p.skip == "sysu"
            assert p.about == dict(dataset="sysu", direction="infrared→visible", mode=mode, shots=shots, gallery="drawn, seed 0")
    assert not all((a == b).all() for a, b in zip(sysu_protocol(r).galleries, sysu_protocol(r, seed=1).galleries))
    assert all((a == b).all() for a, b in zip(sysu_protocol(r, seed=1).galleries, sysu_protocol(r, seed=1).galleries))


def test_sysu_protocol_on_a_table_without_splits(bases):
    r = read("sysu", bases["sysu"]).test[["pid", "cam", "frame"]].reset_index(drop=True)
    p = sysu_protocol(r, "indoor", 1, direction="visible -> infrared")
    assert set(r.cam[p.query]) == {1, 2} and set(r.cam[p.galleries[0]]) == {3, 6} and p.about["direction"] == "visible→infrared"


def test_protocols_of_every_dataset_say_what_they_are(bases):
    for name, n in (("sysu", 4), ("regdb", 2), ("llcm", 2)):
        data = read(name, bases[name])
        for p in protocols(data):
            assert {"dataset", "direction", "mode", "shots", "gallery"} <= set(p.about) and p.about["dataset"] == name
            kinds = p.about["direction"].split("→")
            assert set(data.records.modality[p.query]) == {kinds[0]}
            for g in p.galleries: assert set(data.records.modality[g]) == {kinds[1]} and set(data.records.split[g]) == {"test"}
        assert len(protocols(data)) == n
        assert [p.about["mode"] for p in protocols(hold_out(data))] == ["all", "all"], "the val identities of SYSU-MM01 were never seen by cameras 1 and 2"
    assert [p.about["direction"] for p in protocols(read("regdb", bases["regdb"]))] == list(DIRECTIONS)
    assert protocols(read_regdb(bases["regdb"], 7))[0].about["trial"] == 7


def test_regdb_and_llcm_galleries(bases):
    regdb, llcm = read("regdb", bases["regdb"]), read("llcm", bases["llcm"])
    p = regdb_protocol(regdb.records, "thermal→visible")
    assert len(p.galleries) == 1 and p.skip is None and len(p.query) == len(p.galleries[0]) == len(regdb.test) // 2
    p = llcm_protocol(llcm.records, "visible→infrared")
    pool = llcm.test[llcm.test.modality == "infrared"]
    assert len(p.galleries) == 10 and p.skip == "llcm"
    for g in p.galleries: assert (llcm.records.loc[g].groupby(["pid", "cam"]).size() == 1).all() and len(g) == pool.groupby(["pid", "cam"]).ngroups


def test_protocol_mistakes(bases):
    r = read("sysu", bases["sysu"]).records
    with pytest.raises(UserError, match="mode = 'outdoor'"): sysu_protocol(r, "outdoor")
    with pytest.raises(UserError, match="direction 'up'; expected visible→infrared or infrared→visible"): regdb_protocol(r, "up")
    with pytest.raises(UserError, match="shots = 0"): sysu_protocol(r, shots=0)
    with pytest.raises(UserError, match="FileNotFoundError.*; get rand_perm_cam.mat"): sysu_protocol(r, permutations=bases["sysu"] / "none.mat")
    with pytest.raises(UserError, match="not the official"): sysu_protocol(r, permutations=bases["sysu"] / "exp/test_id.txt")


def test_draws_are_uniform():
    pool = pd.DataFrame(dict(pid=np.repeat([1, 2], 5), cam=1), index=range(10))
    counts = np.bincount(np.concatenate([draw_gallery(pool, 1, 0, t) for t in range(4000)]), minlength=10)
    assert counts.sum() == 8000 and np.abs(counts - 800).max() < 120


def test_official_galleries_follow_the_permutations(sysu_protocol_files):
    file = sysu_protocol_files / "rand_perm_cam.mat"
    counts, splits = sysu_counts(file)
    assert (len(splits["train"]), len(splits["val"]), len(splits["test"])) == (296, 99, 96)
    rows = [(p, c, i) for (c, p), n in sorted(counts.items()) if p in splits["test"] for i in range(1, n + 1)]
    r = pd.DataFrame(rows, columns=["pid", "cam", "frame"])
    table = read_permutations(file)
    for mode, shots, size in (("all", 1, 301), ("indoor", 1, 112), ("all", 10, 3010), ("indoor", 10, 1120)):
        p = sysu_protocol(r, mode, shots, permutations=file)
        assert len(p.query) == 3803 and [len(g) for g in p.galleries] == [size] * 10 and p.about["gallery"] == "official permutations"
        for t, g in enumerate(p.galleries):
            for (cam, pid), group in r.loc[g].groupby(["cam", "pid"]): assert set(group.frame) == set(table[cam - 1][pid - 1][t, :shots])
    with pytest.raises(UserError, match="the official permutations are of"): sysu_protocol(r[r.index != r.index[r.cam == 1][0]], permutations=file)


def test_ten_trials_at_true_scale(true_scale):
    "Features of one axis an identity are found without a mistake; drawn at random they are not."
    data = read("sysu", true_scale)
    pid = data.records.pid.to_numpy()
    told, noise = np.eye(pid.max() + 1, dtype=np.float32)[pid], np.random.default_rng(0).standard_normal((len(pid), 16)).astype(np.float32)
    for p in protocols(data):
        whole, chance = (evaluate_protocol(f, data.records, p) for f in (told, noise))
        r, where = data.records, data.records.loc[p.galleries[0]].groupby("pid").cam.agg(set)
        left = sum(bool(where.get(r.pid[q], set()) - ({2} if r.cam[q] == 3 else set())) for q in p.query)                  # queries with a match that is not skipped
        assert len(whole.trials) == 10 and (whole.metrics.cmc[0], whole.metrics.mAP, whole.metrics.num_queries) == (1, 1, left)
        assert chance.metrics.cmc[0] < 0.06


def test_protocols_at_true_scale(true_scale):
    data = read("sysu", true_scale)
    for p, size in zip(protocols(data), (301, 3010, 112, 1120)): assert len(p.query) == 3803 and {len(g) for g in p.galleries} == {size}
