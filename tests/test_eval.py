"Evaluation and retrieval: the official protocol, exact search, after-steps, the command line and the page, each against a plain version."
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from di2l import eval as ev
from di2l.console import UserError
from di2l.data.cache import cache_images
from di2l.data.records import read_sysu
from di2l.eval import Protocol, llcm_protocol, regdb_protocol, sysu_protocol
from di2l.rca import normalise
from di2l.retrieval import feature_files as ff, features as fe, looking as lo, page as pa, rerank as re_, search as se
from di2l.synthetic.benchmark import write_benchmark

# ---------------------------------------------------------------- the oracle: one query at a time, as the authors' MATLAB reads

PLACE = {1: 1, 2: 2, 3: 2, 4: 4, 5: 5, 6: 6}
RULES = {None: lambda qp, gp, qc, gc: False, "sysu": lambda qp, gp, qc, gc: PLACE[qc] == PLACE[gc], "llcm": lambda qp, gp, qc, gc: qp == gp and qc == gc}


def oracle(dist, q_pids, g_pids, q_cams, g_cams, skip, once, max_rank=20):
    "CMC, and for each query AP, INP, place of the first match and its place in the CMC; None where the query does not count."
    per, rule = [], RULES[skip]
    for i in range(len(dist)):
        order = sorted(range(len(g_pids)), key=lambda j: (dist[i][j], j))
        kept = [j for j in order if not rule(q_pids[i], g_pids[j], q_cams[i], g_cams[j])]
        hits = [n + 1 for n, j in enumerate(kept) if g_pids[j] == q_pids[i]]
        if not hits:
            per.append(None)
            continue
        people = []
        for j in kept:
            if not once or g_pids[j] not in people: people.append(g_pids[j])
        ap = sum((n + 1) / hit for n, hit in enumerate(hits)) / len(hits)
        per.append((ap, len(hits) / hits[-1], hits[0], people.index(q_pids[i]) + 1))
    counted = [p for p in per if p]
    cmc = [sum(p[3] <= k for p in counted) / len(counted) for k in range(1, max_rank + 1)] if counted else None
    return cmc, per


def compare(found, cmc, per):
    counted = [p for p in per if p]
    assert found.num_queries == len(counted)
    assert np.array_equal(found.per_query["counts"], [p is not None for p in per])
    assert [(h, r) for h, r, c in zip(found.per_query["hit"].tolist(), found.per_query["rank"].tolist(), found.per_query["counts"]) if c] == [(p[2], p[3]) for p in counted]
    ap, inp = (np.array([p[i] for p in counted]) for i in (0, 1))
    np.testing.assert_allclose(found.per_query["ap"][found.per_query["counts"]], ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.cmc, cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose([found.mAP, found.mINP], [ap.mean(), inp.mean()], rtol=0, atol=1e-12)


cases = st.fixed_dictionaries(dict(
    seed=st.integers(0, 2**31), Q=st.integers(1, 9), G=st.integers(1, 40), people=st.integers(1, 9), values=st.sampled_from([1, 2, 5, 50, None]),
    skip=st.sampled_from([None, "sysu", "llcm"]), by_identity=st.booleans(), block=st.integers(1, 10), double=st.booleans(), strangers=st.booleans(), crowd=st.booleans()))


def draw(c):
    "Distances with as few different values as asked for, identities that may never meet, a gallery that may be one person's crowd."
    rng = np.random.default_rng(c["seed"])
    dist = rng.random((c["Q"], c["G"])) if c["values"] is None else rng.integers(0, c["values"], (c["Q"], c["G"])) / 7
    q_pids, g_pids = rng.integers(0, c["people"], c["Q"]), rng.integers(0, c["people"], c["G"])
    if c["strangers"]: q_pids = np.where(rng.random(c["Q"]) < .5, 1000 + q_pids, q_pids)
    if c["crowd"]: g_pids = np.where(rng.random(c["G"]) < .8, 0, np.arange(c["G"]))
    return dist.astype(np.float64 if c["double"] else np.float32), q_pids, g_pids, rng.integers(1, 7, c["Q"]), rng.integers(1, 7, c["G"])


@settings(max_examples=4000)
@given(cases)
def test_equals_the_oracle(c):
    args = draw(c)
    cmc, per = oracle(*(x.tolist() for x in args), c["skip"], c["by_identity"])
    call = lambda: ev.evaluate(*args, skip=c["skip"], by_identity=c["by_identity"], block=c["block"])
    if cmc is None:
        with pytest.raises(UserError): call()
    else: compare(call(), cmc, per)


@settings(max_examples=150)
@given(st.integers(0, 2**31), st.sampled_from([3, 20, 60]), st.booleans())
def test_equals_the_oracle_with_many_matches(seed, matches, ties):
    rng = np.random.default_rng(seed)                        # more than 16 matches a query: looked up in sorted lists
    g_pids, q_pids = rng.permutation(np.repeat(np.arange(4), matches)), rng.integers(0, 4, 5)
    dist = rng.integers(0, 30, (5, len(g_pids))).astype(np.float32) if ties else rng.random((5, len(g_pids)))
    cams = rng.choice([3, 6], 5), rng.choice([1, 2, 4, 5], len(g_pids))
    compare(ev.evaluate(dist, q_pids, g_pids, *cams, skip="sysu"), *oracle(dist.tolist(), q_pids.tolist(), g_pids.tolist(), *(c.tolist() for c in cams), "sysu", True))


def test_edges():
    one = ev.evaluate([[0.3]], [5], [5])                     # a gallery of one image
    assert (one.rank(1), one.rank(20), one.mAP, one.mINP, one.num_queries) == (1, 1, 1, 1, 1)
    assert len(one.cmc) == 20                                # fewer than 20 people: the curve stays where it ended
    tied = ev.evaluate(np.zeros((1, 4)), [2], [1, 1, 2, 2], skip=None, by_identity=True)
    assert tied.per_query["rank"][0] == 2 and tied.per_query["hit"][0] == 3
    assert ev.evaluate(torch.tensor([[1, 2]]), [5], [6, 5]).per_query["hit"][0] == 2          # whole numbers, a tensor
    half = ev.evaluate(np.array([[1., 2], [1, 2]]), [1, 9], [1, 2])
    assert half.num_queries == 1 and half.mAP == 1           # the query without a match does not count
    camera2 = ev.evaluate(np.array([[1., 2, 3]]), [1], [9, 1, 1], [3], [2, 2, 1], skip="sysu")
    assert camera2.per_query["hit"][0] == 1                  # all of camera 2 is gone, the other person's image too


def test_custom_rule_and_blocks():
    rng = np.random.default_rng(0)
    args = rng.random((37, 90)).astype(np.float32), rng.integers(0, 6, 37), rng.integers(0, 6, 90), rng.integers(1, 7, 37), rng.integers(1, 7, 90)
    rule = lambda q_pids, g_pids, q_cams, g_cams: q_cams == g_cams
    whole = ev.evaluate(*args, skip=rule)
    for block in (1, 5, 36, 1000):
        some = ev.evaluate(*args, skip=rule, block=block)
        assert some.to_dict() == whole.to_dict()
        assert all(np.array_equal(some.per_query[k], whole.per_query[k]) for k in whole.per_query)


def test_metrics_print_render_and_average():
    a, b = ev.evaluate([[1., 2]], [5], [5, 6]), ev.evaluate([[2., 1]], [5], [5, 6])
    assert "rank-1" in str(a) and "100.00" in str(a) and "50.00" in repr(b)
    both = ev.Result([a, b], {})
    m, s = both.metrics, both.spread
    assert (m.rank(1), m.mAP, m.num_queries) == (.5, .75, 1) and s.rank(1) == pytest.approx(.5**.5)
    assert set(json.loads(json.dumps(m.to_dict()))) >= {"rank1", "rank10", "rank20", "mAP", "mINP", "cmc", "num_queries"}
    with pytest.raises(ValueError): a.rank(0)


# ---------------------------------------------------------------- distances

@settings(max_examples=150)
@given(st.integers(0, 2**31), st.integers(1, 70), st.sampled_from(["normal", "offset", "tiny", "mixed", "whole", "half"]))
def test_distances_are_true_whatever_stands_around_a_pair(seed, D, kind):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(23, D))
    x = {"normal": x, "offset": x + 100, "tiny": x * 1e-20, "mixed": x * 10. ** rng.integers(-8, 9, (23, 1)), "whole": rng.integers(-9, 9, (23, D)), "half": x.astype(np.float16)}[kind]
    x = x.astype(np.float32) if kind in ("normal", "offset") else x
    x[9] = x[4]
    whole = ev.distances(x[:8], x[8:])
    a, b = x[:8, None].astype(np.longdouble), x[8:].astype(np.longdouble)
    length = (a**2).sum(2) + (b**2).sum(1)
    assert (np.abs(whole.astype(np.longdouble) ** 2 - ((a - b) ** 2).sum(2)) <= 2e-12 * length).all()
    order, slack = rng.permutation(15), 1e-7 * np.sqrt(length.max()).astype(float)
    np.testing.assert_allclose(whole[2:5, 3:4], ev.distances(x[2:5], x[11:12]), rtol=1e-9, atol=slack)
    np.testing.assert_allclose(whole[:, order], ev.distances(x[:8], x[8:][order]), rtol=1e-9, atol=slack)
    assert whole[4, 1] == 0                                  # x[9] is x[4]
    if kind == "whole": assert np.array_equal(whole, np.sqrt(((a - b) ** 2).sum(2).astype(float)))


def test_copies_tie_whatever_the_shape():
    rng = np.random.default_rng(0)
    for Q, G, D in ((100, 301, 2048), (7, 1000, 37), (33, 791, 100)):
        q, g = rng.normal(size=(Q, D)).astype(np.float32), rng.normal(size=(1, D)).astype(np.float32)
        for metric in ("euclidean", "cosine"): assert np.ptp(ev.distances(q, np.repeat(g, G, 0), metric), axis=1).max() == 0


def test_cosine():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(9, 20)), rng.normal(size=(11, 20))
    true = 1 - (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(ev.distances(a, b, "cosine"), true, atol=1e-12)
    np.testing.assert_allclose(ev.distances(a * 1e6, b * 1e-6, "cosine"), true, atol=1e-12)


def test_a_crowd_of_one_person_and_many_people_stay_in_bounds():
    "9,000 images of one person beside 9,000 people of one image each: a table of both would be gigabytes."
    rng = np.random.default_rng(2)
    g_pids, dist = np.r_[np.zeros(9000, int), np.arange(1, 9001)], rng.random((6, 18000)).astype(np.float32)
    q_pids = np.array([0, 5, 6, 0, 7, 8])
    tracemalloc.start()
    found = ev.evaluate(dist, q_pids, g_pids, by_identity=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    i = 1
    place = (dist[i] <= dist[i, 9000 + 4]).sum()
    assert found.per_query["hit"][i] == place and found.per_query["rank"][i] == 1 + len(set(g_pids[dist[i] < dist[i, 9004]].tolist()))


def test_numbers_of_any_width_and_order():
    rng = np.random.default_rng(3)
    q, g = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    for kind in (">f4", np.longdouble): assert np.array_equal(ev.distances(q.astype(kind), g.astype(kind)), ev.distances(q, g))
    assert ev.distances(np.array([[-128, 0]], np.int8), np.array([[0, 0]], np.int8))[0, 0] == 128
    d, big = np.array([[2., 1.]]), 2**53
    a = ev.evaluate(d, np.array([big + 1], np.uint64), np.array([big + 1, big], np.int64), [3.], [1., 4.], skip="sysu")
    assert a.per_query["hit"][0] == 2                        # as floats both would be the same person
    for pids in (["5"], [5.5], np.array([2**64 - 1], np.uint64)):
        with pytest.raises(UserError, match="q_pids has to be whole numbers"): ev.evaluate([[.3]], pids, [5])
    with pytest.raises(UserError, match="device meta: not to be had"): fe.torch_device("meta")
    with pytest.raises(UserError, match="device abacus: not to be had"): fe.torch_device("abacus")


def test_messages_name_the_rows_of_the_users_table():
    x, records = np.ones((6, 2)), tmp_table(6).assign(pid=[1, 2, 1, 2, 1, 2])
    x[4] = 0
    with pytest.raises(UserError, match="1 of 2 rows are all zeros.*first rows: 4"): ev.evaluate_protocol(x, records, Protocol(np.array([0, 1]), [np.array([2, 4])], None, {}), "cosine")
    g = np.random.default_rng(0).normal(size=(3000, 2))
    g[2500] = 0
    with pytest.raises(UserError, match="all zeros.*first rows: 2500"): se.search(g[:3], g, 2, "cosine", block=1024)


def test_after_steps_say_what_memory_they_need(monkeypatch):
    import psutil
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="re-ranking 30 images holds .* GB of distances, and .* GB are free"): re_._k_reciprocal(np.ones((10, 2)), np.ones((20, 2)))


# ---------------------------------------------------------------- search

devices = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"))]


def by_sorting(q, g, k, metric="euclidean"):
    d = ev.distances(q, g, metric)
    order = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, order, 1), order


@pytest.mark.parametrize("device", devices)
@settings(max_examples=120)
@given(st.integers(0, 2**31), st.integers(1, 90), st.integers(1, 25), st.integers(1, 100), st.sampled_from(["normal", "copies", "whole", "offset", "same"]), st.sampled_from(["euclidean", "cosine"]))
def test_search_is_a_stable_sort_for_any_block(device, seed, G, k, block, kind, metric):
    rng = np.random.default_rng(seed)
    q, g = rng.normal(size=(6, 12)).astype(np.float32), rng.normal(size=(G, 12)).astype(np.float32)
    if kind == "copies": g = g[rng.integers(0, max(1, G // 8), G)]
    if kind == "whole": q, g = np.round(q) + 5, np.round(g) + 5
    if kind == "offset": q, g = q + 1000, g + 1000
    if kind == "same": g[:] = g[0]
    if kind == "whole" and metric == "cosine": g = g + rng.normal(size=g.shape) / 9    # else different vectors have equal cosines
    found, true = se.search(q, g, k, metric, device, block), by_sorting(q, g, k, metric)
    assert np.array_equal(found[1], true[1])
    np.testing.assert_allclose(found[0], true[0], rtol=1e-9, atol=1e-7)


def test_search_in_a_memory_map_and_a_crowd_of_ties(tmp_path):
    rng = np.random.default_rng(3)
    g = np.memmap(tmp_path / "gallery", np.float32, "w+", shape=(3000, 16))
    g[:] = rng.normal(size=(1, 16))                          # 3,000 copies: the first rows win
    g[1500] += 1e-3
    q = np.array(g[:2]) + .1
    assert np.array_equal(se.search(q, g, 5, block=64)[1], by_sorting(q, g, 5)[1])
    g[:] = rng.normal(size=g.shape)
    assert np.array_equal(se.search(q, g, 20, block=700)[1], by_sorting(q, g, 20)[1])
    with pytest.raises(UserError, match="k = 0: expected a whole number"): se.search(q, g, 0)


def test_metrics_in_blocks():
    import pandas as pd
    rng = np.random.default_rng(4)
    q, g = rng.normal(size=(30, 24)).astype(np.float32), rng.normal(size=(200, 24)).astype(np.float32)
    g[50:60] = g[:10]
    who = rng.integers(0, 8, 30), rng.integers(0, 8, 200), rng.choice([3, 6], 30), rng.choice([1, 2, 4, 5], 200)
    whole = ev.evaluate(ev.distances(q, g), *who, skip="sysu")
    records = pd.DataFrame(dict(pid=np.r_[who[0], who[1]], cam=np.r_[who[2], who[3]]))
    plan = Protocol(np.arange(30), [np.arange(30, 230)], "sysu", {})
    for block in (1, 7, 30, 99): assert ev.evaluate_protocol(np.concatenate([q, g]), records, plan, block=block).trials[0].to_dict() == whole.to_dict()


# ---------------------------------------------------------------- after-steps

def naive_expansion(q, g, k, alpha, skipped):
    out = []
    for i, x in enumerate(q):
        order = sorted((j for j in range(len(g)) if not skipped[i][j]), key=lambda j: (np.sqrt(((x - g[j]) ** 2).sum()), j))[:k]
        total, weights = x.copy(), 1.
        for j in order:
            w = max(0., (x @ g[j]) / np.linalg.norm(x) / np.linalg.norm(g[j])) ** alpha
            total, weights = total + w * g[j], weights + w
        out.append(total / weights)
    return np.array(out)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 15), st.sampled_from([0, 1, 3]))
def test_query_expansion(seed, G, k, alpha):
    rng = np.random.default_rng(seed)
    q, g, skipped = rng.normal(size=(5, 4)), rng.normal(size=(G, 4)), rng.random((5, G)) < .3
    np.testing.assert_allclose(re_._expand_queries(q, g, k, alpha, skipped=skipped), naive_expansion(q, g, k, alpha, skipped), atol=1e-9)


def naive_rerank(q, g, k1, k2, weight):
    x = np.concatenate([q, g])
    N = len(x)
    d = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    d = d / d.max(1, keepdims=True)
    near = [sorted(range(N), key=lambda j: (d[i, j], j)) for i in range(N)]
    def R(p, k): return {j for j in near[p][:k + 1] if p in near[j][:k + 1]}
    V = np.zeros((N, N))
    for p in range(N):
        star = set(R(p, k1))
        for c in R(p, k1):
            small = R(c, int(round(k1 / 2)))
            if len(small & R(p, k1)) > 2 / 3 * len(small): star |= small
        for j in star: V[p, j] = np.exp(-d[p, j])
        V[p] /= V[p].sum()
    V = np.array([V[near[p][:k2]].mean(0) for p in range(N)])
    out = np.zeros((len(q), len(g)))
    for i in range(len(q)):
        for j in range(len(g)):
            a, b = V[i], V[len(q) + j]
            out[i, j] = (1 - weight) * (1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()) + weight * d[i, len(q) + j]
    return out


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 14), st.integers(1, 22), st.integers(1, 7), st.sampled_from([0, .3, 1]))
def test_k_reciprocal(seed, Q, G, k1, k2, weight):
    rng = np.random.default_rng(seed)
    q, g = rng.normal(size=(Q, 3)), rng.normal(size=(G, 3))
    k1 = min(k1, Q + G - 1)
    np.testing.assert_allclose(re_._k_reciprocal(q, g, k1, k2, weight), naive_rerank(q, g, k1, k2, weight), atol=1e-9)


class Fake:
    "A network whose feature is the column means of its image; the infrared stem adds one."
    def to(self, device): return self
    def eval(self): return self
    def __call__(self, visible=None, infrared=None): return visible.mean((1, 2)) if infrared is None else infrared.mean((1, 2)) + 1


def test_extract_features_routes_modalities_and_flips():
    import pandas as pd
    rng = np.random.default_rng(6)
    pixels = torch.from_numpy(rng.integers(0, 256, (7, 3, 4, 5), dtype=np.uint8))
    images, records = SimpleNamespace(__getitem__=None), pd.DataFrame({"modality": ["visible", "infrared"] * 3 + ["visible"]})
    images = type("Cache", (), {"__getitem__": lambda self, rows: pixels[torch.as_tensor(rows)]})()
    rows = np.array([6, 1, 0, 3, 2])
    true = np.array([(normalise(pixels[r:r + 1].float() / 255).mean((1, 2))[0] + (r % 2)).numpy() for r in rows])
    plain, flip = (fe.extract_features(Fake(), images, records, rows, "cpu", batch=2, flip=f) for f in (False, True))
    np.testing.assert_allclose(plain, true, atol=1e-6)
    np.testing.assert_allclose(flip, (true + true[:, ::-1]) / 2, atol=1e-6)
    assert plain.dtype == np.float32


# ---------------------------------------------------------------- protocols

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data = read_sysu(write_benchmark(tmp_path_factory.mktemp("eval") / "tiny", preset="tiny", seed=0))
    rng = np.random.default_rng(7)
    person = rng.normal(size=(data.records.pid.max() + 1, 8))
    return data, (person[data.records.pid] + rng.normal(size=(len(data.records), 8))).astype(np.float32)


def test_protocol_is_the_mean_over_trials(tiny):
    data, features = tiny
    r = data.records
    for mode, shots in (("all", 1), ("all", 10), ("indoor", 1), ("indoor", 10)):
        p = sysu_protocol(r, mode, shots, trials=3)
        result = ev.evaluate_protocol(features, r, p, block=11)
        for m, g in zip(result.trials, p.galleries):
            d = ev.distances(features[p.query], features[g])
            compare(m, *oracle(d.tolist(), *(r[c].to_numpy()[i].tolist() for c, i in (("pid", p.query), ("pid", g), ("cam", p.query), ("cam", g))), "sysu", True))
        assert result.metrics.mAP == np.mean([m.mAP for m in result.trials])
        assert result.about["mode"] == mode and result.about["shots"] == shots and "seed 0" in result.about["gallery"]


def test_after_steps_are_off_and_named(tiny):
    data, features = tiny
    p = sysu_protocol(data.records, trials=2)
    plain = ev.evaluate_protocol(features, data.records, p, flip=False)
    assert plain.about["expansion"] is None and plain.about["re-ranking"] is None and "re-ranking" not in str(plain)
    expanded, ranked = (ev.evaluate_protocol(features, data.records, p, compare=re_.after_steps(**after)) for after in (dict(expand=2), dict(rerank=dict(k1=5, k2=2))))
    assert "expansion 2 images" in str(expanded) and "k1 5, k2 2, λ 0.3" in str(ranked)
    r, g = data.records, p.galleries[1]
    true = ev.evaluate(re_._k_reciprocal(features[p.query], features[g], 5, 2), r.pid[p.query], r.pid[g], r.cam[p.query], r.cam[g], "sysu")
    assert ranked.trials[1].to_dict() == true.to_dict()


def test_regdb_and_llcm(tiny):
    data, features = tiny
    for maker, skip, once in ((regdb_protocol, None, False), (llcm_protocol, "llcm", True)):
        p = maker(data.records, direction="visible→infrared")
        result, r, g = ev.evaluate_protocol(features, data.records, p), data.records, p.galleries[0]
        d = ev.distances(features[p.query], features[g])
        compare(result.trials[0], *oracle(d.tolist(), *(r[c].to_numpy()[i].tolist() for c, i in (("pid", p.query), ("pid", g), ("cam", p.query), ("cam", g))), skip, once))
        assert result.about["direction"] == "visible→infrared"


def score(features=None, gallery=None, run=None, metric="euclidean", skip=None, expand=0, rerank=False, json=None, protocol="sysu", direction=None, device=None, **plan):
    "What `di2l_eval` does with its arguments, as plain functions."
    compare = re_.after_steps(expand, rerank, metric)
    if run: results = ev.evaluate_run(run, direction=direction, metric=metric, compare=compare, device=device, **plan)
    elif gallery: results = [ff.evaluate_files(features, gallery, skip, metric, compare)]
    else:
        table, records = ff.read_features(features)
        results = [ev.evaluate_protocol(table, records, p, metric, compare) for p in ff.feature_protocols(records, protocol, direction, **plan)]
    if json: Path(json).write_text(globals()["json"].dumps(ff.results_json(results)))
    print(ff.report(results))


def official_table(folder):
    "Feature table of SYSU-MM01's true size, from the counts in the official permutations: pid, cam, frame of the 96 test identities."
    from scipy.io import loadmat
    perm, ids = loadmat(folder / "rand_perm_cam.mat")["rand_perm_cam"], np.unique(loadmat(folder / "test_id.mat")["id"])
    rows = [(i, c + 1, f + 1) for c in range(6) for i in ids for f in range(perm[c][0][i - 1][0].shape[1])]
    return perm, ids, np.array(rows)


@pytest.mark.parametrize("mode, shots, trials", [("all", 1, 10), ("indoor", 10, 1)])
def test_official_permutations_at_true_size(sysu_protocol_files, tmp_path, mode, shots, trials):
    perm, ids, rows = official_table(sysu_protocol_files)
    pid, cam, frame = rows[np.random.default_rng(8).permutation(len(rows))].T
    rng = np.random.default_rng(9)
    features = (rng.normal(size=(600, 32))[pid] * .4 + rng.normal(size=(len(pid), 32)))
    features = (np.round(features * 8) / 8).astype(np.float32)  # exact in binary, so that both sides see the same ties
    features[::50] = features[7]                             # copies, so ties
    file, out = tmp_path / "f.npz", tmp_path / "out.json"
    np.savez(file, features=features, pid=pid, cam=cam, frame=frame)
    score(features=str(file), protocol="sysu", mode=mode, shots=shots, trials=trials, permutations=str(sysu_protocol_files / "rand_perm_cam.mat"), json=str(out))
    found = json.loads(out.read_text())
    assert len(found["trials"]) == trials and found["about"]["gallery"] == "official permutations"
    row = {key: n for n, key in enumerate(zip(pid.tolist(), cam.tolist(), frame.tolist()))}
    query = np.flatnonzero(np.isin(cam, (3, 6)))
    assert len(query) == 3803
    for t in range(trials):
        gallery = np.sort([row[i, c, f] for c in ((1, 2, 4, 5) if mode == "all" else (1, 2)) for i in ids for f in (perm[c - 1][0][i - 1][0][t, :shots].tolist() if perm[c - 1][0][i - 1][0].size else ())])
        if (mode, shots) == ("all", 1): assert len(gallery) == 301
        some = np.random.default_rng(t).choice(len(query), 300, replace=False) if t else np.arange(len(query))   # all queries once, then a sample
        d = ((features[query[some], None].astype(float) - features[gallery]) ** 2).sum(2)
        cmc, per = oracle(d.tolist(), pid[query[some]].tolist(), pid[gallery].tolist(), cam[query[some]].tolist(), cam[gallery].tolist(), "sysu", True)
        if t == 0:
            np.testing.assert_allclose(found["trials"][0]["cmc"], cmc, atol=1e-12)
            np.testing.assert_allclose([found["trials"][0]["mAP"], found["trials"][0]["mINP"]], [np.mean([p[i] for p in per if p]) for i in (0, 1)], atol=1e-12)
        else: assert abs(found["trials"][t]["mAP"] - np.mean([p[0] for p in per if p])) < .1
    assert found["rank1"] == pytest.approx(np.mean([t["rank1"] for t in found["trials"]]))
    assert found["mAP"] == pytest.approx(np.mean([t["mAP"] for t in found["trials"]]))


# ---------------------------------------------------------------- bad input: a message, no number

@pytest.fixture
def table(tiny, tmp_path):
    "Writes the tiny benchmark's test features as an .npz, changed as asked."
    data, features = tiny
    test = data.test
    good = dict(features=features[test.index], pid=test.pid.to_numpy(), cam=test.cam.to_numpy(), frame=test.frame.to_numpy())
    def write(name="f.npz", drop=(), **changes):
        np.savez(tmp_path / name, **{k: v for k, v in {**good, **changes}.items() if k not in drop})
        return str(tmp_path / name)
    write.good = good
    return write


def nan_rows(x, *rows, value=np.nan):
    x = x.copy(); x[list(rows), 0] = value
    return x


BAD = {
    "NaN": (lambda g: dict(features=nan_rows(g["features"], 3, 8)), "2 of .* rows are NaN, infinite or above 1e100 .*3, 8"),
    "infinite": (lambda g: dict(features=nan_rows(g["features"], 5, value=np.inf)), "first rows: 5"),
    "lengths": (lambda g: dict(pid=g["pid"][:-1]), "pid has to be whole numbers, one for each of .* images; found shape"),
    "camera": (lambda g: dict(cam=np.where(np.arange(len(g["cam"])) == 4, 9, g["cam"])), "camera 9 in row 4"),
    "strangers": (lambda g: dict(pid=np.where(np.isin(g["cam"], (3, 6)), g["pid"] + 500, g["pid"])), "no query identity is in the gallery"),
    "no dimensions": (lambda g: dict(features=g["features"][:, :0]), "of shape .*, 0.*expected numbers"),
    "no rows": (lambda g: {k: v[:0] for k, v in g.items()}, "of shape .0, .*expected numbers"),
    "words": (lambda g: dict(features=g["features"].astype(str)), "expected numbers"),
    "a pid in words": (lambda g: dict(pid=g["pid"].astype(str)), "pid has to be whole numbers"),
    "half a cam": (lambda g: dict(cam=g["cam"] + .5), "cam has to be whole numbers"),
    "half a pid": (lambda g: dict(pid=g["pid"] + .5), "pid has to be whole numbers"),
    "zeros, cosine": (lambda g: dict(features=g["features"] * 0, metric="cosine"), "all zeros, which have no direction"),
    "no frame": (lambda g: dict(drop=("frame",)), "come without frame"),
    "no cam": (lambda g: dict(drop=("cam",)), "cam is not a file in the archive.*expected an .npz with"),
    "metric": (lambda g: dict(metric="manhattan"), "metric = 'manhattan'"),
    "protocol": (lambda g: dict(protocol="market"), "protocol = 'market'"),
    "mode": (lambda g: dict(mode="outdoor"), "outdoor"),
    "shots": (lambda g: dict(shots=0), "shots"),
    "trials": (lambda g: dict(trials=0), "trials = 0: expected a whole number, 1 or more"),
    "modality": (lambda g: dict(protocol="llcm", modality=np.array(["thermal"] * len(g["pid"]))), "modality = 'thermal'; there are visible, infrared"),
    "permutations": (lambda g: dict(permutations="nowhere.mat"), "nowhere.mat: is not the official rand_perm_cam.mat .FileNotFoundError"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_features_are_refused(table, capsys, name):
    make, message = BAD[name]
    changes = make(table.good)
    options = {k: changes.pop(k) for k in ("metric", "protocol", "mode", "permutations", "shots", "trials", "device") if k in changes}
    with pytest.raises(UserError, match=message): score(features=table(**changes), **options)
    assert capsys.readouterr().out == ""


def test_only_what_is_wanted_is_read_of_a_feature_file(table):
    "Anything else in the file may be larger than memory, or an object that must not be unpickled."
    features, records = ff.read_features(table(paths=np.array([Path("a"), None], dtype=object)))
    assert np.array_equal(features, table.good["features"]) and list(records) == ["pid", "cam", "frame"]


def test_permutations_of_another_dataset(table, sysu_protocol_files, tmp_path):
    with pytest.raises(UserError, match="official permutations"): score(features=table(), permutations=str(sysu_protocol_files / "rand_perm_cam.mat"))
    with pytest.raises(UserError, match="rand_perm_cam"): score(features=table(), permutations=str(sysu_protocol_files / "test_id.mat"))


def test_other_bad_calls(table, tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for options, message in ((dict(features=str(tmp_path / "none.npz")), "No such file.*expected an .npz"), (dict(features=str(tmp_path / "text.npz")), "is no feature file"),
                             (dict(features=table(), gallery=table("short.npz", features=table.good["features"][:, :3])), "from one network"),
                             (dict(features=table(), gallery=table("g.npz"), skip="market"), "skip = 'market'")):
        with pytest.raises(UserError, match=message): score(**options)
    with pytest.raises(UserError, match="3 rows of features for 4 records"): ev.evaluate_protocol(np.ones((3, 2)), tmp_table(4), SimpleNamespace(query=[0], galleries=[[1]], skip=None, about={}))
    with pytest.raises(UserError, match="above 1e100"): ev.distances(np.ones((1, 2)) * 1e200, np.ones((1, 2)))


def tmp_table(n):
    import pandas as pd
    return pd.DataFrame(dict(pid=range(n), cam=1))


def test_any_protocol(table, capsys, tmp_path):
    g = table.good
    infrared = np.isin(g["cam"], (3, 6))
    q, r = (table(name, **{k: v[at] for k, v in g.items()}) for name, at in (("q.npz", infrared), ("g.npz", ~infrared)))
    score(features=q, gallery=r, skip="sysu", json=str(tmp_path / "any.json"))
    true = ev.evaluate(ev.distances(g["features"][infrared], g["features"][~infrared]), g["pid"][infrared], g["pid"][~infrared], g["cam"][infrared], g["cam"][~infrared], "sysu")
    assert json.loads((tmp_path / "any.json").read_text())["mAP"] == true.mAP
    assert "skip sysu" in capsys.readouterr().out
    score(features=q, gallery=r, skip="sysu", rerank=True, expand=2, json=str(tmp_path / "after.json"))
    assert json.loads((tmp_path / "after.json").read_text())["mAP"] != true.mAP and "re-ranking" in capsys.readouterr().out


def test_llcm_features_are_drawn_by_seed_and_trials(table, capsys):
    g = table.good
    f = table(modality=np.where(np.isin(g["cam"], (3, 6)), "infrared", "visible"))
    score(features=f, protocol="llcm", seed=7, trials=2)
    assert "seed 7" in capsys.readouterr().out


def test_the_drawn_gallery_does_not_depend_on_the_order_of_the_table(table):
    g, found = table.good, []
    for rows in np.arange(len(g["pid"])), np.random.default_rng(0).permutation(len(g["pid"])):
        features, records = ff.read_features(table("shuffled.npz", **{k: v[rows] for k, v in g.items()}))
        plan, = ff.feature_protocols(records, trials=3)
        found.append([sorted(records.loc[gallery, ["pid", "cam", "frame"]].apply(tuple, axis=1)) for gallery in plan.galleries])
    assert found[0] == found[1]


def test_held_out_results_say_so_and_a_trial_counts_once(run, tmp_path):
    held = tmp_path / "held"; shutil.copytree(run, held)
    info = json.loads((held / "config.json").read_text()); info["config"]["hold_out"] = True
    (held / "config.json").write_text(json.dumps(info))
    result = ev.evaluate_run(held, mode="all", shots=1, device="cpu")[0]
    assert "held out" in result.title()
    some, whole = (pa.search_run(folder, limit=4, k=99, device="cpu") for folder in (held, run))
    assert not set(some.pid) & set(whole.pid)
    twice = ev.evaluate_protocol(np.eye(4), tmp_table(4).assign(pid=[1, 2, 1, 2], cam=[1, 1, 3, 3]), Protocol(np.arange(2, 4), [np.arange(2)], None, dict(dataset="regdb")), trial=1)
    with pytest.raises(UserError, match="trial 1 is there twice"): ff.pool_trials([twice, twice])


def test_features_beyond_float32_are_searched_by_exact_distance():
    q, g = np.full((2, 3), 1e30), np.random.default_rng(0).normal(size=(50, 3)) * 1e30
    found, true = se.search(q, g, 2), by_sorting(q, g, 2)
    assert np.array_equal(found[1], true[1])
    np.testing.assert_allclose(found[0], true[0], rtol=1e-9, atol=1e-7)


# ---------------------------------------------------------------- runs, the commands, the page

@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    "A run folder as training leaves it, with an untrained network."
    from safetensors.torch import save_file
    from di2l.model import METHODS
    data, folder = tiny[0], tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    settings_ = dict(backbone="resnet10", weights=None)
    save_file(METHODS["di2l"](**settings_).network(12).state_dict(), folder / "model.safetensors")
    config = dict(dataset="sysu", root=str(data.root), trial=1, size=[96, 48], hold_out=False)
    (folder / "config.json").write_text(json.dumps(dict(config=config, method=dict(name="di2l", **settings_), num_ids=12)))
    return folder


def test_run_and_features_agree(run, tiny, table, capsys, tmp_path):
    data = tiny[0]
    from di2l.runs.folder import load_network
    images = cache_images(data, (96, 48))
    found = fe.extract_features(load_network(run)[0], images, data.records, data.test.index.to_numpy(), "cpu")
    score(features=table(features=found), mode="indoor", shots=10, json=str(tmp_path / "a.json"))
    direct = ev.evaluate_run(run, mode="indoor", shots=10, device="cpu")[0]
    assert json.loads((tmp_path / "a.json").read_text())["trials"] == direct.to_dict()["trials"]


def test_runs_of_several_splits_are_averaged(tiny):
    data, features = tiny
    results = []
    for trial in (1, 2, 3):
        p = regdb_protocol(data.records, direction="visible→infrared")
        results.append(ev.evaluate_protocol(features + trial * np.random.default_rng(trial).normal(size=features.shape), data.records, p, trial=trial))
    one, = ff.pool_trials(results)
    assert len(one.trials) == 3 and one.about["trial"] == "1, 2, 3" and one.metrics.mAP == np.mean([r.metrics.mAP for r in results])
    assert len(ff.pool_trials([results[0], ev.evaluate_protocol(features, data.records, regdb_protocol(data.records, direction="infrared→visible"), trial=1)])) == 2


def test_bfloat16_and_missing_cameras():
    d = torch.rand(3, 5)
    a, b = ev.evaluate(d.bfloat16(), [1, 2, 3], [1, 2, 3, 1, 2]), ev.evaluate(d.bfloat16().float(), [1, 2, 3], [1, 2, 3, 1, 2])
    assert a.to_dict() == b.to_dict()
    assert np.array_equal(ev.distances(d.half(), d.bfloat16()), ev.distances(d.half().float(), d.bfloat16().float()))
    with pytest.raises(UserError, match="give q_cams"): ev.evaluate(d, [1, 2, 3], [1, 2, 3, 1, 2], skip="sysu")


def test_checkpoint_of_another_architecture(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    info = json.loads((other / "config.json").read_text())
    info["method"]["dpa"] = False
    (other / "config.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="another network"): score(run=str(other))
    with pytest.raises(UserError, match="not a finished run"): score(run=str(tmp_path))
    with pytest.raises(UserError, match="no protocol with .*outdoor"): score(run=str(run), mode="outdoor")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    found = pa.search_run(run, limit=4, k=5, device="cpu")
    return pa.retrieval_page(found, tmp_path_factory.mktemp("page") / "page.html"), found.to_dict("records")


def test_search_in_a_run(page, run, tiny, tmp_path):
    html, found = page
    text = html.read_text(encoding="utf-8")
    assert len(found) == 20 and [r["rank"] for r in found[:5]] == [1, 2, 3, 4, 5]
    assert all(r["right"] == (r["pid"] == r["query_pid"]) for r in found)
    assert not any(r["query_cam"] == 3 and r["cam"] == 2 for r in found)
    assert text.count('class="result') == 20 and "http" not in text and text.count("src=") == text.count('src="data:image/jpeg') == 24
    data = tiny[0]
    camera, same = Path(data.root) / "cam1", dict(modality="visible", gallery_modality="visible", k=2, device="cpu")
    assert (lambda t: (t["path"] != t["query_path"]).all())(pa.search_run(run, limit=3, **same))
    lone = pa.search_run(run, Path(data.root) / data.test.path.iloc[-1], camera, k=3, device="cpu")
    assert "unknown" in pa.retrieval_page(lone, tmp_path / "p.html").read_text(encoding="utf-8")
    hits = pa.search_run(run, sorted(camera.iterdir())[0], camera, **same)                    # no skip rule here: an image would find itself first
    assert len(hits) and (hits["path"] != hits["query_path"]).all() and set(hits["rank"]) == {1, 2}
    for words in (dict(k=0), dict(limit=0)):
        with pytest.raises(UserError, match="expected a whole number, 1 or more"): pa.search_run(run, **words)
    with pytest.raises(UserError, match="gallery_modality = 'foo'"): pa.search_run(run, gallery_modality="foo")
    with pytest.raises(UserError, match="no such file"): pa.search_run(run, tmp_path / "none.jpg")


def test_an_image_does_not_find_itself_under_another_name(run, tiny, tmp_path, monkeypatch):
    data, same = tiny[0], dict(modality="visible", gallery_modality="visible", k=2, device="cpu")
    monkeypatch.chdir(Path(data.root).parent)                # the gallery's paths are relative, the query's is not
    itself = Path(data.root).resolve() / data.test.path[data.test.modality == "visible"].iloc[0]
    (tmp_path / "link.jpg").symlink_to(itself)
    for name in (itself, tmp_path / "link.jpg"):
        hits = pa.search_run(run, name, root=Path(data.root).name, **same)
        assert len(hits) == 2 and not any(os.path.samefile(itself, path) for path in hits["path"])


def test_page_in_a_browser(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser: pytest.skip("no Chromium here (apt-get install chromium)")
    html, found = page
    def dom(change):
        changed = tmp_path / "changed.html"
        changed.write_text(html.read_text(encoding="utf-8").replace(*change) + "<p id=shown></p><script>document.getElementById('shown').textContent = 'visible: ' + "
                           "[...document.querySelectorAll('figure.result')].filter(f => f.checkVisibility()).map(f => f.classList[1]).join(' ') + '.'</script>", encoding="utf-8")
        call = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", changed.as_uri()]
        return re.search(r"visible: ([a-z ]*)\.", subprocess.run(call, capture_output=True, text=True, timeout=60).stdout)[1].split()
    right = sum(r["right"] for r in found)
    assert sorted(dom(("", ""))) == ["right"] * right + ["wrong"] * (20 - right)
    for kind, n in (("right", right), ("wrong", 20 - right)): assert dom((f'id="{kind}"', f'id="{kind}" checked')) == [kind] * n    # as the keyboard chooses it


def test_a_page_of_strange_names_runs_nothing(page, tmp_path):
    import pandas as pd
    evil = tmp_path / "<script>alert(1)</script>\" onload='x'.jpg".replace("/", "-"); shutil.copy(page[1][0]["path"], evil)
    table = pd.DataFrame([{**page[1][0], "path": str(evil), "query_path": str(evil), "pid": "<b>"}])
    text = pa.retrieval_page(table, tmp_path / "evil.html", "<i>title").read_text(encoding="utf-8")
    assert not re.search("<script|<b>|<i>", text) and all(set(re.sub(r'="[^"]*"', "", tag).split()) <= {"<img", "src", "alt", "<figure", "class", "title"} for tag in re.findall("<(?:img|figure)[^>]*", text))


# ---------------------------------------------------------------- looking inside

def test_attention_maps_are_kept_and_put_back(run, tiny):
    from di2l.runs.folder import load_network
    net, images = load_network(run)[0], cache_images(tiny[0], (96, 48))
    maps = lo.attention_maps(net, images[[0, 1]], "visible")
    assert set(maps) == {"non_local2", "non_local3", "dpa"}
    for a in maps.values():
        assert a.shape[0] == 2 and a.shape[1] == a.shape[2]
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:2]))
    assert not any(getattr(m, "keep_attention", False) for m in net.modules())
