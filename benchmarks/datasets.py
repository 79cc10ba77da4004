"""The data layer against the usual way, both sides interleaved in one run; medians of ratios to results/benchmarks/datasets.json.

Times are of the processor, all threads together, which other programs do not stretch: they compare work, and a build whose threads wait for a disk
or for each other looks as good as one that does not. Fields with `wall` in their names are by the clock on the wall, taken in the same rounds: what
a user waits, on a machine with nothing else to do."""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from di2l import rca
from di2l.data.cache import cache_images, decode, in_parallel
from di2l.data.checker import verify
from di2l.data.records import read_regdb, read_sysu
from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from standins import write_standin


def both(work):
    "Seconds of the processor, all threads together, and seconds on the wall."
    start, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - start, time.perf_counter() - wall


def seconds(work): return both(work)[0]


def ratios(slow, fast, rounds, times=1):
    "Medians of slow/fast, by the processor and on the wall, over interleaved rounds, the short side `times` times a round; one round before is not counted."
    pairs = [(both(slow), np.median([both(fast) for _ in range(times)], axis=0)) for _ in range(rounds + 1)][1:]
    return tuple(statistics.median(float(a[k] / b[k]) for a, b in pairs) for k in (0, 1))


def ratio(*args): return ratios(*args)[0]


def camera_images(folder, n, seed=0):
    "RegDB's layout with images about as large and as hard to decode as a camera's crops: 230×100, smooth with noise."
    rng = np.random.default_rng(seed)
    for kind, split in product(("visible", "thermal"), ("train", "test")):
        lines = []
        for k in range(n // 4):
            path = f"{kind.title()}/{2 * k + (split == 'test')}/a.jpg"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 6, 3), dtype=np.uint8)).resize((100, 230), Image.Resampling.BICUBIC))
            Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)).save(folder / path, quality=90)
            lines.append(f"{path} {k}")
        (folder / "idx").mkdir(exist_ok=True)
        (folder / f"idx/{split}_{kind}_1.txt").write_text("\n".join(lines))
    return read_regdb(folder)


def cache_build(top, n, rounds):
    "Building a cache over decoding and resizing alone, by the same threads: by the processor, and on the wall."
    data = camera_images(top / "crops", n)
    files = [str(data.root / p) for p in data.records.path]
    def alone(): in_parallel(lambda i: decode(Path(files[i]).read_bytes(), files[i], (288, 144)), len(files), "")
    def build(): shutil.rmtree(top / "cache", ignore_errors=True); cache_images(data, (288, 144), top / "cache")
    return ratios(build, alone, rounds)


def batch(top, rounds):
    "The usual per-image pipeline in one process over ours, for 96 images of 288×144: from image files, and from arrays decoded before; ours with and without the memory of the batch before."
    data = camera_images(top / "batch", 96)
    cache, paths = cache_images(data, (288, 144), top / "cache"), [data.root / p for p in data.records.path]
    pixels, which, generator, last = np.array(cache.images), np.arange(96), torch.Generator().manual_seed(0), {}
    usual = transforms.Compose([transforms.Pad(10), transforms.RandomCrop((288, 144)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                transforms.Normalize(rca.IMAGENET_MEAN, rca.IMAGENET_STD), transforms.RandomErasing(0.5)])
    def from_files(): return torch.stack([usual(Image.open(paths[i]).resize((144, 288), Image.Resampling.LANCZOS)) for i in which])
    def from_arrays(): return torch.stack([usual(Image.fromarray(pixels[i])) for i in which])
    def fresh(): return rca.augment(cache[which], generator)
    def ours():
        last["raw"] = cache.read(which, last.get("raw"))
        last["batch"] = rca.augment(last["raw"], generator, out=last.get("batch"))
        return last["batch"]
    assert from_files().shape == from_arrays().shape == ours().shape == (96, 3, 288, 144)
    return dict(batch_from_files_over_ours=ratio(from_files, ours, rounds, 3), batch_from_arrays_over_ours=ratio(from_arrays, ours, rounds, 3),
                batch_from_arrays_over_ours_in_fresh_memory=ratio(from_arrays, fresh, rounds, 3))


def batches(processes, rounds):
    "The ratios of several fresh processes, since how fast the usual pipeline is depends on the memory that its process was given: median, lowest and highest."
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = [pool.submit(one_process, rounds).result() for _ in range(processes)]
    return {name: [round(f(ratios[name] for ratios in found), 1) for f in (statistics.median, min, max)] for name in found[0]}


def one_process(rounds):
    "`batch` in a folder of its own."
    with tempfile.TemporaryDirectory() as folder: return batch(Path(folder), rounds)


def records(top, permutations):
    "Seconds to read the records of SYSU-MM01's full tree, and to verify it, each by the processor and on the wall."
    root = write_standin("sysu", top / "sysu", permutations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return root, len(read_sysu(root).records), np.min([both(lambda: read_sysu(root)) for _ in range(3)], axis=0).tolist(), both(lambda: verify("sysu", root))


MEMORY = """
import sys, numpy as np
from di2l.data.cache import ImageCache
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
cache = ImageCache(sys.argv[1], np.arange(int(sys.argv[2])))
cache[np.arange(64)]
before = peak()
for start in range(0, len(cache) - 96, 96): cache[np.arange(start, start + 96)]
print((peak() - before) / 1e6)
"""


TRAINING = """
import sys
sys.path.insert(0, sys.argv[1])
root, out = sys.argv[2:]
if root == "-":
    from train import engine
    step = engine()
    step(); step()
else:
    from di2l.runs.config import config
    from di2l.train import train
    train(config("paper-sysu", root=root, weights=None, device="cpu", steps=2), out, quiet=True)
print(next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if line.startswith("VmHWM")))   # ru_maxrss would begin at the parent's
"""


def training(top, root):
    "Gigabytes at the peak of two steps of the preset `paper-sysu`: on a dataset on disk, checkpoint and all, and of the same steps on 64 images in memory."
    cache_images(read_sysu(root), (288, 144))
    def peak(*words): return float(subprocess.run([sys.executable, "-c", TRAINING, str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.split()[-1])
    return peak(str(root), str(top / "run")), peak("-", "-")


def evaluation(root, permutations):
    "Seconds of the four protocols of ten trials each, from features in memory."
    from di2l import eval as ev
    data = read_sysu(root)
    rng = np.random.default_rng(0)
    pid = data.records.pid.to_numpy()
    features = (rng.standard_normal((pid.max() + 1, 512))[pid] + 1.5 * rng.standard_normal((len(pid), 512))).astype(np.float32)
    return {f"{p.about['mode']} {p.about['shots']}-shot, {len(p.query)} x {len(p.galleries[0])}": round(seconds(lambda: ev.evaluate_protocol(features, data.records, p)), 1)
            for p in ev.protocols(data, permutations=permutations)}


def memory(top, n):
    "Gigabytes that reading every image of a cache adds to a process, and the size of the cache in gigabytes."
    path = top / "large.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, (n, 288, 144, 3))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path), str(n)], capture_output=True, text=True, check=True)
    return float(done.stdout), path.stat().st_size / 1e9


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--rounds", type=int, default=5)
    ask.add_argument("--processes", type=int, default=9, help="fresh processes that time a batch")
    ask.add_argument("--images", type=int, default=2000, help="images of the cache that is built")
    ask.add_argument("--tmp", help="where to work; a folder in memory keeps a busy disk out of the ratios")
    ask.add_argument("--permutations", help="official rand_perm_cam.mat, for SYSU-MM01's real counts")
    ask.add_argument("--out", default=Path(__file__).resolve().parents[1] / "results/benchmarks/datasets.json", type=Path)
    ask.add_argument("--only", nargs="*", default=["batch", "cache", "scale"], help="sections; what others left in --out stays")
    a = ask.parse_args()
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=a.tmp) as folder:
        top = Path(folder)
        if "batch" in a.only: found |= dict(batches(a.processes, 2 * a.rounds), batch_processes=a.processes)
        if "cache" in a.only: found |= dict(zip(("cache_build_over_decoding", "cache_build_over_decoding_wall"), (round(r, 2) for r in cache_build(top, a.images, a.rounds))))
        if "scale" in a.only:
            root, n, read, verified = records(top, a.permutations)
            added, size = memory(top, 20000)
            found |= dict(zip(("training_peak_gigabytes", "same_steps_without_a_dataset_gigabytes"), (round(g, 2) for g in training(top, root))))
            found["ten_trials_seconds"] = evaluation(root, a.permutations)
            found |= dict(sysu_records=n, sysu_records_seconds=round(read[0], 2), sysu_records_wall_seconds=round(read[1], 2),
                          sysu_verify_seconds=round(verified[0], 1), sysu_verify_wall_seconds=round(verified[1], 1), reading_adds_gigabytes=round(added, 2), of_a_cache_of_gigabytes=round(size, 2))
    found |= dict(machine=machine())
    for name, value in found.items(): print(f"{name:28} {value}")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
