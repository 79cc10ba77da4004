"""How fast the embedded benchmark is written: `python benchmarks/synthetic.py` → results/benchmarks/synthetic.json.

Processor time is what is recorded (images a second of one core, JPEG included), since wall-clock time depends on what else the machine does; wall-clock time is printed only.
Sizes, memory and the ratio of times for twice the images are recorded as they are."""
import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from di2l.synthetic.benchmark import _encode, _image_path, read_benchmark, write_benchmark
from di2l.synthetic.sensors import LAYOUTS, PRESETS, render

SYSU, REGDB = LAYOUTS["sysu"], LAYOUTS["regdb"]


def rate(settings, cameras, people, first=1):
    "Images a second of one core's time: drawn and encoded."
    began = time.process_time()
    for pid in range(first, first + people):
        for cam in cameras:
            _encode(render(settings, 0, pid, cam, 1), _image_path(settings, pid, cam, 1), settings.quality)
    return people * len(cameras) / (time.process_time() - began)


def rates(repeats, people):
    "Medians over interleaved repeats, for each size and sensor."
    d = PRESETS["default"]
    what = {"sysu 96x48": (d, SYSU), "sysu 128x64": (replace(d, height=128, width=64), SYSU), "regdb 128x64": (PRESETS["regdb"], REGDB)}
    for s, cams in what.values(): rate(s, cams, 2)  # places and imports
    seen = {name: [] for name in what}
    for r in range(repeats):
        for name, (s, cams) in what.items(): seen[name].append(rate(s, cams, people, 1 + r * people))
    return {name: round(statistics.median(v)) for name, v in seen.items()}


def linearity(repeats, people):
    "Time an image at four times the people over time an image at one time, interleaved."
    d, ratios = PRESETS["default"], []
    for r in range(repeats):
        first = 1000 + 5 * people * r
        ratios.append(rate(d, SYSU, people, first) / rate(d, SYSU, 4 * people, first + people))
    return round(statistics.median(ratios), 3)


def whole(preset):
    "A preset written to disk: size, memory, processor time; wall-clock time is printed."
    with tempfile.TemporaryDirectory() as tmp:
        used = lambda: sum(sum(resource.getrusage(w)[:2]) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        cpu, wall = used(), time.perf_counter()
        root = write_benchmark(Path(tmp) / "b", preset=preset)
        cpu, wall = used() - cpu, time.perf_counter() - wall
        size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
        images = read_benchmark(root)["images"]
    peak = max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / (1024 if sys.platform != "darwin" else 1024 ** 2)
    print(f"{preset}: {images} images in {wall:.0f} s by the clock, {cpu:.0f} s of processor time; load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return dict(images=images, megabytes=round(size / 1e6, 1), processor_seconds=round(cpu, 1), images_a_core_second=round(images / cpu), largest_process_megabytes=round(peak))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--quick", action="store_true", help="fewer repeats, tiny instead of default")
    p.add_argument("--out", default="results/benchmarks/synthetic.json")
    args = p.parse_args()
    repeats, people = (3, 5) if args.quick else (7, 12)
    result = dict(images_a_core_second=rates(repeats, people), time_an_image_at_4x_over_1x=linearity(repeats, people), written=whole("tiny" if args.quick else "default"))
    from machine import machine                                          # only now: PyTorch would count as memory of the writing
    result["machine"] = machine()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
