"""One training step beside the plain one, both sides in one run: `python benchmarks/train.py [--ids 8] [--repeat 3] [--threads N] [--public FOLDER]` → results/benchmarks/train.json.

The plain side is what the field's public code does, written from its description: three complete ResNet-50s of which two give their stem only, five
one-channel non-local blocks, GeM, cross-entropy and the squared, clamped WRT, all in float32 in NCHW, stepped by an unfused SGD. The other side is
`di2l.train`'s step of the paper's preset. Processor seconds of the process are compared, so that other programs on the machine count little;
the file holds ratios and shares, since seconds depend on the machine."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SIZE, K = (288, 144), 395


# --- the plain side

class PlainNonLocal(nn.Module):
    "Non-local block with one inner channel, the affinity divided by the number of positions."
    def __init__(self, channels):
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(channels, 1, 1) for _ in range(3))
        self.out, self.norm = nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        g, theta, phi = (f(x).flatten(2) for f in (self.g, self.theta, self.phi))          # (B,1,N)
        y = (theta.transpose(1, 2) @ phi / theta.shape[2]) @ g.transpose(1, 2)             # (B,N,1)
        return x + self.norm(self.out(y.transpose(1, 2).reshape(len(x), 1, *x.shape[2:])))


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        from torchvision.models import resnet50
        self.visible, self.infrared, self.shared = (resnet50(weights=None) for _ in range(3))
        self.shared.layer4[0].conv2.stride = self.shared.layer4[0].downsample[0].stride = (1, 1)
        self.blocks = nn.ModuleDict({"2": nn.ModuleList(PlainNonLocal(512) for _ in range(2)), "3": nn.ModuleList(PlainNonLocal(1024) for _ in range(3))})
        self.neck, self.classifier = nn.BatchNorm1d(2048), nn.Linear(2048, K, bias=False)

    def forward(self, visible, infrared):
        stem = lambda net, x: net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x = torch.cat([stem(self.visible, visible), stem(self.infrared, infrared)])
        for stage in 1, 2, 3, 4:
            layers = getattr(self.shared, f"layer{stage}")
            blocks = list(self.blocks[str(stage)]) if str(stage) in self.blocks else []
            for i, layer in enumerate(layers):
                x = layer(x)
                after = i - (len(layers) - len(blocks))
                if after >= 0: x = blocks[after](x)
        feature = ((x.flatten(2) ** 3).mean(2) + 1e-12) ** (1 / 3)
        return feature, self.classifier(self.neck(feature))


def plain_loss(feature, logits, pids):
    "Cross-entropy, and WRT with the square clamped at 88."
    d = (feature.pow(2).sum(1, keepdim=True) + feature.pow(2).sum(1) - 2 * feature @ feature.T).clamp(min=1e-12).sqrt()
    same = (pids[:, None] == pids).float()
    weight = lambda x, mask: (x - (x * mask).amax(1, keepdim=True)).exp() * mask / (((x - (x * mask).amax(1, keepdim=True)).exp() * mask).sum(1, keepdim=True) + 1e-6)
    p, n = (d * same * weight(d * same, same)).sum(1), (d * (1 - same) * weight(-d * (1 - same), 1 - same)).sum(1)
    return F.cross_entropy(logits, pids) + F.soft_margin_loss((p - n).square().clamp(max=88), (n > p).float() * 2 - 1)


def plain(ids):
    torch.manual_seed(0)
    net = PlainNet().train()
    heads = {id(p) for m in (net.neck, net.classifier) for p in m.parameters()}
    opt = torch.optim.SGD([dict(params=[p for p in net.parameters() if id(p) not in heads], lr=0.01), dict(params=[p for p in net.parameters() if id(p) in heads])],
                          lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    visible, infrared, pids = torch.randn(8 * ids, 3, *SIZE), torch.randn(4 * ids, 3, *SIZE), torch.arange(ids).repeat_interleave(4).repeat(3)
    def step():
        loss = plain_loss(*net(visible, infrared), pids)
        opt.zero_grad(); loss.backward(); opt.step()
        return loss.item()
    return step


def public(ids, folder):
    "The step of the public code itself, from a checkout of mangye16/Cross-Modal-Re-ID-baseline: the folder ICCV21_CAJ. Random weights, no download."
    sys.path.insert(0, str(folder))
    import resnet
    made = resnet.resnet50
    resnet.resnet50 = lambda pretrained=False, **k: made(**k)
    from loss import TripletLoss_ADP
    from model import embed_net
    torch.manual_seed(0)
    net, triplet = embed_net(K).train(), TripletLoss_ADP(square=1)
    heads = [*net.bottleneck.parameters(), *net.classifier.parameters()]
    body = [p for p in net.parameters() if not any(p is h for h in heads)]
    opt = torch.optim.SGD([dict(params=body, lr=0.01), dict(params=heads, lr=0.1)], weight_decay=5e-4, momentum=0.9, nesterov=True)
    visible, infrared, pids = torch.randn(8 * ids, 3, *SIZE), torch.randn(4 * ids, 3, *SIZE), torch.arange(ids).repeat_interleave(4).repeat(3)
    def step():
        feature, logits = net(visible, infrared)
        loss = F.cross_entropy(logits, pids) + triplet(feature, pids)[0]
        opt.zero_grad(); loss.backward(); opt.step()
        return loss.item()
    return step


# --- the engine's side, on images in memory

def fake_data(identities, each, size):
    "Records, and a cache of one random image for every 64 records."
    import pandas as pd
    from di2l.data.records import Dataset
    n = identities * 2 * each
    records = pd.DataFrame(dict(path=[""] * n, pid=np.repeat(np.arange(identities), 2 * each), cam=1, modality=np.tile(np.repeat(["visible", "infrared"], each), identities), split="train", frame=1))
    few = np.random.default_rng(0).integers(0, 256, (64, *size, 3), dtype=np.uint8)
    class Cache:
        images, digest = SimpleNamespace(nbytes=n * few[0].nbytes), ""
        def read(self, rows, out=None): return torch.from_numpy(few[np.asarray(rows) % 64]).permute(0, 3, 1, 2)
    return Dataset("sysu", Path("."), records), Cache()


def engine(ids=8, identities=K, each=4, preset="paper-sysu", **changes):
    "A `Run` of the preset on images in memory."
    from unittest import mock
    from di2l import train as T
    from di2l.runs.config import config
    dataset, cache = fake_data(identities, each, config(preset).size)
    given = dict(read_dataset=lambda *a, **k: dataset, cache_images=lambda *a, **k: cache)
    with mock.patch.multiple(T, **given):
        run = T.Run(config(preset, ids=ids, device="cpu", **({"weights": None} | changes)), "unused")
    def step():
        run.one_step()
        return run.read()[0]["loss"]
    step.run = run
    return step


SIDES = dict(plain=plain, engine=engine, checkpointing=lambda ids: engine(ids, checkpointing=True), fp32=lambda ids: engine(ids, precision="fp32"))


# --- measurements

def cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(sides, repeat, *words):
    "Processor seconds of each side's third step, each time in a fresh process (how memory is asked for is a process's own), the sides taking turns."
    took = {name: [] for name in sides}
    for _ in range(repeat):
        for name in sides:
            done = subprocess.run([sys.executable, __file__, "--time", name, *words], capture_output=True, text=True, check=True)
            took[name].append(float(done.stdout.split()[-1]))
            print(f"  {name} {took[name][-1]:.2f} s", flush=True)
    return took


def peak_memory(side, ids, threads):
    "Most memory of a fresh process that takes two steps, in MB."
    words = [sys.executable, __file__, "--memory", side, "--ids", str(ids), "--threads", str(threads)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def matrix_peak():
    "FLOP a processor second that a large bf16 product reaches here."
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 2048 ** 3 / min(cpu_seconds(lambda: a @ b) for _ in range(6))


def flops(step):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter: step()
    return counter.get_total_flops()


def operators(step, top=12):
    "Share of one step's processor time that each operator takes itself."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU]) as p: step()
    table = sorted(((e.key, e.self_cpu_time_total) for e in p.key_averages()), key=lambda kv: -kv[1])
    whole = sum(t for _, t in table)
    return {k: round(t / whole, 3) for k, t in table[:top]}


def step_section(ids, repeat, threads, caj=None):
    turns = interleaved(["plain", "engine", "fp32", *(["public"] if caj else [])], repeat, "--ids", str(ids), "--threads", str(threads), *(["--public", caj] if caj else []))
    took, step = {n: statistics.median(t) for n, t in turns.items()}, engine(ids)
    step()
    work, peak = flops(step), matrix_peak()
    out = dict(images=12 * ids, threads=threads, processor_has=dict(amx=torch.cpu._is_amx_tile_supported(), avx512_bf16=torch.cpu._is_avx512_bf16_supported()), turns=repeat, spread_of_seconds={n: round((max(t) - min(t)) / took[n], 2) for n, t in turns.items()}, times_faster_than_plain=round(took["plain"] / took["engine"], 2), times_faster_than_own_fp32=round(took["fp32"] / took["engine"], 2),
               tflop_a_step=round(work / 1e12, 2), share_of_bf16_matrix_peak=round(work / took["engine"] / peak, 2), operators=operators(step))
    if caj: out["times_faster_than_public_caj"] = round(took["public"] / took["engine"], 2)
    return out


def memory_section(ids, threads):
    "Peak memory of two steps, each side in a process of its own."
    memory = {n: peak_memory(n, ids, threads) for n in ("plain", "engine", "checkpointing")}
    return dict(images=12 * ids, peak_memory_mb=memory, **{f"{n}_over_plain": round(memory[n] / memory["plain"], 2) for n in ("engine", "checkpointing")})


def growth_section():
    "Processor time of making a batch, by identities and by images; the epoch's plan counted by its share of a step."
    out = {}
    for name, identities, each in (("100 identities", 100, 50), ("10000 identities", 10_000, 50), ("10000 images", 1000, 5), ("1000000 images", 1000, 500)):
        run = engine(8, identities, each, preset="quick").run
        plan = cpu_seconds(lambda: run.batches.rows(1)) / run.per_epoch
        batch = statistics.median(cpu_seconds(lambda i=i: run.batches(1, i)) for i in range(1, 8))
        out[name] = batch + plan
        print(f"  {name}: batch {1e3 * batch:.1f} ms, plan {1e3 * plan:.2f} ms a step", flush=True)
    return {"batch_with_100_times_the_identities": round(out["10000 identities"] / out["100 identities"], 2), "batch_with_100_times_the_images": round(out["1000000 images"] / out["10000 images"], 2)}


def quick_section(repeat):
    step = engine(8, preset="quick")
    for _ in range(3): step()
    batch = statistics.median(cpu_seconds(lambda i=i: step.run.batches(0, i)) for i in range(5 * repeat))
    return dict(share_of_a_quick_step_for_its_batch=round(batch / statistics.median(cpu_seconds(step) for _ in range(3 * repeat)), 3))


def curve_section(steps=50):
    "50 steps of the quick preset on the smallest embedded benchmark: float32, bf16, and float32 with other seeds of the initial weights."
    from di2l import train as T
    from di2l.runs.config import config
    from di2l.synthetic.benchmark import write_benchmark
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        write_benchmark(f"{folder}/tiny", preset="tiny")
        for name, changes in dict(fp32={}, bf16=dict(precision="bf16"), **{f"seed {s}": dict(seed=s) for s in (1, 2, 3)}).items():
            run = T.Run(config("quick", root=f"{folder}/tiny", device="cpu", steps=600, **{"precision": "fp32", **changes}), "unused")
            losses[name] = []
            for _ in range(steps): run.one_step(); losses[name] += [r["loss"] for r in run.read()]
    apart = lambda a, b: float(np.abs(np.array(losses[a]) - losses[b]).mean())
    seeds = [apart("fp32", f"seed {s}") for s in (1, 2, 3)]
    return dict(steps=steps, mean_loss=round(float(np.mean(losses["fp32"])), 3), bf16_from_fp32=round(apart("fp32", "bf16"), 4), other_seeds_from_fp32=[round(s, 4) for s in seeds])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ids", type=int, default=8, help="identities in a batch; each has 12 images")
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--threads", type=int, default=1, help="1: processor seconds are then the step's own, whatever else runs")
    p.add_argument("--public", help="folder ICCV21_CAJ of the public code, to time its own step too")
    p.add_argument("--memory", choices=SIDES, help="print the peak memory of one side and leave")
    p.add_argument("--time", choices=[*SIDES, "public"], help="print the processor seconds of one side's third step and leave")
    p.add_argument("--out", default=Path(__file__).resolve().parents[1] / "results" / "benchmarks" / "train.json", type=Path)
    p.add_argument("--only", nargs="*", default=["growth", "quick", "curve", "step", "memory"])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        step = SIDES[args.memory](args.ids)
        step(); step()
        return print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))     # ru_maxrss would begin at the parent's
    if args.time:
        step = public(args.ids, args.public) if args.time == "public" else SIDES[args.time](args.ids)
        step(); step()                                                     # until its memory is there
        return print(cpu_seconds(step))
    sections = dict(growth=growth_section, quick=lambda: quick_section(args.repeat), curve=curve_section, step=lambda: step_section(args.ids, args.repeat, args.threads, args.public),
                    memory=lambda: memory_section(args.ids, args.threads))
    from machine import machine
    result = (json.loads(args.out.read_text()) if args.out.exists() else {}) | dict(machine=machine())
    for name in args.only:
        print(name, flush=True)
        result[name] = sections[name]()
        print(json.dumps(result[name], indent=1), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
