"""Evaluation and search beside the usual ways, both sides in one run: `python benchmarks/eval.py [--quick]` → results/benchmarks/eval.json.

The file holds ratios of processor time and sizes; seconds depend on the machine and are printed only. With `--threads 1` neither side waits for the other's threads."""
import argparse
import ctypes
import json
import threading
import time
from pathlib import Path

import numpy as np
import torch

from di2l import eval as ev
from di2l.eval import Protocol
from di2l.retrieval.search import search
from machine import machine


def usual_loop(dist, q_pids, g_pids, q_cams, g_cams, sysu, max_rank=20):
    "One query at a time as the protocol reads: sort, drop camera 2 for camera 3, walk down the list. The walk is plain Python, as in the field's codes."
    order, cmc, ap, inp = np.argsort(dist, axis=1, kind="stable"), [], [], []
    for i in range(len(dist)):
        kept = order[i]
        if sysu and q_cams[i] == 3: kept = kept[g_cams[kept] != 2]
        pids = g_pids[kept]
        right = (pids == q_pids[i]).astype(np.int32)
        if not right.any(): continue
        line = right
        if sysu:
            first = np.unique(pids, return_index=True)[1]
            line = (pids[np.sort(first)] == q_pids[i]).astype(np.int32)
        curve = np.minimum(line.cumsum(), 1)[:max_rank]
        cmc.append(np.pad(curve, (0, max_rank - len(curve)), mode="edge"))
        found = right.cumsum()
        ap.append((np.asarray([n / (place + 1.) for place, n in enumerate(found)]) * right).sum() / right.sum())
        inp.append(found[-1] / (np.flatnonzero(right)[-1] + 1.))
    return np.mean(cmc, axis=0), np.mean(ap), np.mean(inp)


def whole_row_loop(dist, q_pids, g_pids, q_cams, g_cams, sysu, max_rank=20):
    "The same loop with its inner walk in whole-row NumPy: harder to beat, seldom seen."
    order, cmc, ap, inp, places = np.argsort(dist, axis=1, kind="stable"), [], [], [], np.arange(1, dist.shape[1] + 1)
    for i in range(len(dist)):
        kept = order[i]
        if sysu and q_cams[i] == 3: kept = kept[g_cams[kept] != 2]
        pids = g_pids[kept]
        right = pids == q_pids[i]
        hits = np.flatnonzero(right) + 1
        if not len(hits): continue
        place = hits[0] if not sysu else 1 + len(np.unique(pids[:hits[0] - 1]))
        cmc.append(places[:max_rank] >= place)
        ap.append((places[:len(hits)] / hits).mean())
        inp.append(len(hits) / hits[-1])
    return np.mean(cmc, axis=0), np.mean(ap), np.mean(inp)


def seconds(call):
    "Processor seconds, which other programs on the machine do not stretch, and what the call returned."
    start = time.process_time()
    out = call()
    return time.process_time() - start, out


def interleaved(calls, repeats):
    "Median seconds of each call, taken in turns (ours, short, three times a turn), and what each returned last."
    times, out = {k: [] for k in calls}, {}
    for _ in range(repeats):
        for k, call in calls.items():
            for _ in range(3 if k.startswith("ours") else 1):
                t, out[k] = seconds(call)
                times[k].append(t)
    return {k: float(np.median(t)) for k, t in times.items()}, out


def people(rng, pid, D=512, spread=1.5):
    "Features of images of people: a person's own vector and noise."
    return (rng.standard_normal((pid.max() + 1, D))[pid] + spread * rng.standard_normal((len(pid), D))).astype(np.float32)


def sysu_like(rng):
    "3,803 queries of cameras 3 and 6, ten single-shot all-search galleries of 301 images, from SYSU-MM01's counts."
    cams = dict(zip((1, 2, 3, 4, 5, 6), (1374, 1565, 1883, 1918, 1918, 1920)))
    seen = dict(zip((1, 2, 3, 4, 5, 6), (56, 56, 93, 94, 95, 96)))
    pid, cam = [], []
    for c, n in cams.items():
        who = rng.permutation(96)[:seen[c]]
        pid.append(np.sort(np.r_[who, rng.choice(who, n - len(who))]))
        cam.append(np.full(n, c))
    pid, cam = np.concatenate(pid), np.concatenate(cam)
    query, galleries = np.flatnonzero(np.isin(cam, (3, 6))), []
    for _ in range(10):
        order = rng.permutation(np.flatnonzero(~np.isin(cam, (3, 6))))
        galleries.append(np.sort(order[np.unique(pid[order] * 8 + cam[order], return_index=True)[1]]))
    assert len(query) == 3803 and {len(g) for g in galleries} == {301}
    return pid, cam, query, galleries


def agree(metrics, trials):
    "Largest difference of any number of any trial."
    return float(max(np.max(np.abs(np.r_[m.cmc - t[0], m.mAP - t[1], m.mINP - t[2]])) for m, t in zip(metrics, trials)))


def protocol_sizes(repeats):
    "SYSU-MM01's and RegDB's sizes: metrics from distances, and (SYSU-MM01) everything from the features."
    import pandas as pd
    rng, out = np.random.default_rng(0), {}
    pid, cam, query, galleries = sysu_like(rng)
    x = people(rng, pid)
    dist = [ev.distances(x[query], x[g]).astype(np.float32) for g in galleries]
    who = [(pid[query], pid[g], cam[query], cam[g]) for g in galleries]
    records, plan = pd.DataFrame(dict(pid=pid, cam=cam)), Protocol(query, galleries, "sysu", dict(dataset="sysu"))
    def plain(q, g): return np.sqrt(np.maximum((q**2).sum(1)[:, None] + (g**2).sum(1) - 2 * q @ g.T, 0))
    times, found = interleaved({
        "loop": lambda: [usual_loop(d, *w, True) for d, w in zip(dist, who)],
        "rows": lambda: [whole_row_loop(d, *w, True) for d, w in zip(dist, who)],
        "ours": lambda: [ev.evaluate(d, *w, skip="sysu") for d, w in zip(dist, who)],
        "loop, features": lambda: [usual_loop(plain(x[query].astype(float), x[g].astype(float)), *w, True) for g, w in zip(galleries, who)],
        "ours, features": lambda: ev.evaluate_protocol(x, records, plan).trials}, repeats)
    print("SYSU-MM01 size, processor seconds:", {k: round(v, 3) for k, v in times.items()})
    out["sysu"] = dict(queries=3803, gallery=301, trials=10, times_faster_than_loop=times["loop"] / times["ours"], times_faster_than_whole_row_loop=times["rows"] / times["ours"],
                       times_faster_from_features=times["loop, features"] / times["ours, features"], largest_difference=agree(found["ours"], found["loop"]),
                       largest_difference_from_features=agree(found["ours, features"], found["loop, features"]))
    pid = np.repeat(np.arange(206), 10)
    d = ev.distances(people(rng, pid, spread=3.), people(rng, pid, spread=3.)).astype(np.float32)
    who = pid, pid, pid * 0 + 2, pid * 0 + 1
    times, found = interleaved({"loop": lambda: usual_loop(d, *who, False), "rows": lambda: whole_row_loop(d, *who, False), "ours": lambda: ev.evaluate(d, *who)}, repeats)
    print("RegDB size, processor seconds:", {k: round(v, 3) for k, v in times.items()})
    out["regdb"] = dict(queries=2060, gallery=2060, times_faster_than_loop=times["loop"] / times["ours"], times_faster_than_whole_row_loop=times["rows"] / times["ours"],
                        largest_difference=agree([found["ours"]], [found["loop"]]))
    return out


class Peak:
    "Largest resident memory inside the `with`, in bytes above its start."
    def __enter__(self):
        ctypes.CDLL(None).malloc_trim(0)                     # what earlier calls have freed is not to be counted as there already
        self.start, self.more, self.done = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def now(self): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def watch(self):
        while not self.done.wait(.02): self.more = max(self.more, self.now() - self.start)

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()


def multiply(q, g, block=8192):
    "The bare products of the same shapes."
    q, g = torch.from_numpy(q), torch.from_numpy(g)
    for i in range(0, len(g), block): q @ g[i:i + block].T


def search_sizes(sizes, repeats):
    "3,803 queries against galleries of 512-dimensional features: exact top-20 beside the bare products and FAISS's exact index."
    try: import faiss
    except ImportError: faiss = None
    rng, rows = np.random.default_rng(1), []
    q = rng.standard_normal((3803, 512), dtype=np.float32)
    for n in sizes:
        g = rng.standard_normal((n, 512), dtype=np.float32)
        index = None
        if faiss: index = faiss.IndexFlatL2(512); index.add(g)
        search(q[:64], g[:8192], 20); multiply(q[:64], g[:8192])
        half, times, peaks = n // 2, {"products": [], "ours": [], "faiss": []}, []
        for _ in range(repeats if n < 10**5 else 1):
            before = seconds(lambda: multiply(q, g[:half]))[0]                            # half before, half after: the load of the machine drifts
            with Peak() as peak: t, found = seconds(lambda: search(q, g, 20))
            times["ours"].append(t); peaks.append(peak.more)
            times["products"].append(before + seconds(lambda: multiply(q, g[half:]))[0])
            if index is not None: t, theirs = seconds(lambda: index.search(q, 20)); times["faiss"].append(t)
        times = {k: float(np.median(t)) for k, t in times.items() if t}
        row = dict(gallery=n, share_of_product_rate=times["products"] / times["ours"], seconds_for_ratio=times["ours"], memory_mb=max(peaks) / 2**20)
        if index is not None: row |= dict(faiss_time_over_ours=times["faiss"] / times["ours"], same_rows_as_faiss=float((theirs[1] == found[1]).mean()))
        rows.append(row)
        print(f"gallery {n}, processor seconds:", {k: round(v, 2) for k, v in times.items()}, {k: round(v, 3) for k, v in row.items()})
        del g, index
    for row in rows: row["cost_over_smallest"] = row["seconds_for_ratio"] / rows[0]["seconds_for_ratio"]
    for row in rows: del row["seconds_for_ratio"]
    return dict(queries=3803, dimensions=512, k=20, galleries=rows)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="galleries up to 10^5, written nowhere")
    arguments.add_argument("--threads", type=int, default=0, help="threads of both sides; 0 leaves them as they are")
    arguments.add_argument("--out", default=str(Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "eval.json"))
    a = arguments.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
        try: import faiss; faiss.omp_set_num_threads(a.threads)
        except ImportError: pass
    result = protocol_sizes(1) | dict(search=search_sizes((10**4, 10**5) if a.quick else (10**4, 10**5, 10**6), 3), machine=machine())
    text = json.dumps(json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.4g}")), indent=1)
    print(text)
    if not a.quick:
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        Path(a.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__": main()
