"""What a training step of every row of Table 1 costs beside CAJ's: `python benchmarks/methods.py [--repeat 3] [--steps 20] [--methods cdp-modern base-modern --out spectra.json]` → results/benchmarks/methods.json.

Each method trains some steps of the preset `quick`, as `42_tuning` has it, in a process of its own, and the methods take turns. A method with phases
goes through all of them, since they are shares of a run. Processor seconds of the process are compared, so that other programs on the machine count
little, and its peak memory above that of a process that has only imported the package. The file holds ratios: seconds depend on the machine."""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from train import cpu_seconds, engine


def peak_mb(): return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def one(method, steps):
    "Processor seconds of every step, and megabytes of memory above the package's own."
    import di2l.methods.recipes                                  # which adds its methods
    from di2l.methods.tuning import row_settings
    from di2l.methods.method import When
    before = peak_mb()
    settings = {k: v for k, v in row_settings(method).items() if k not in ("ids", "steps")}
    run = engine(8, identities=100, each=20, preset="quick", precision="fp32", **settings, steps=steps).run
    took, turns = [], []
    for i in range(steps):
        turns.append(" ".join(run.method.turns(When(i, run.per_epoch, steps))))
        took.append(cpu_seconds(run.one_step))
    return dict(seconds=took, turns=turns, memory=peak_mb() - before)


def phases(found):
    "{turns: median seconds of a step}, the first step of all left out, which asks for memory."
    of = {}
    for turns, seconds in list(zip(found["turns"], found["seconds"]))[1:]: of.setdefault(turns, []).append(seconds)
    return {turns: statistics.median(s) for turns, s in of.items()}


def mean_step(found):
    "Seconds of a step, the mean over a run."
    typical = phases(found)
    return statistics.mean(typical[turns] for turns in found["turns"] if turns in typical)


def main():
    from di2l.methods.rows import TABLE1
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--methods", nargs="+", default=[m for m in TABLE1 if m != "caj"], help="measured beside CAJ")
    p.add_argument("--one", help="measure one method and print it")
    p.add_argument("--out", default=Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "methods.json", type=Path)
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.one: return print(json.dumps(one(args.one, args.steps)))
    from machine import machine
    rounds, methods = [], ["caj", *args.methods]
    for _ in range(args.repeat):
        rounds.append({})
        for method in methods:
            done = subprocess.run([sys.executable, __file__, "--one", method, "--steps", str(args.steps)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            rounds[-1][method] = dict(step=mean_step(found), dearest=max(phases(found).values()), memory=found["memory"])
            print(method, {k: round(v, 3) for k, v in rounds[-1][method].items()}, flush=True)
    def over_caj(method, what, base): return round(statistics.median(r[method][what] / r["caj"][base] for r in rounds), 2)
    rows = {m: dict(step=over_caj(m, "step", "step"), dearest_phase=over_caj(m, "dearest", "step"), memory=over_caj(m, "memory", "memory")) for m in methods}
    args.out.write_text(json.dumps(dict(over_caj=rows, steps=args.steps, turns=args.repeat, machine=machine()), indent=1) + "\n")


if __name__ == "__main__": main()
