"Training: resumed to the bit, shared exactly, stopped in time, and every option does something."
import hashlib, json, multiprocessing, os, random, re, resource, shutil, signal, socket, subprocess, sys, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from di2l import files as F, model, train as T
from di2l.console import UserError
from di2l.runs import batches as B, folder as R, process as P
from di2l.runs.config import Config, config, show_config
from di2l.runs.log import read_log
from di2l.synthetic.benchmark import write_benchmark

torch.set_num_threads(1)          # small images: a second thread gains nothing, and on a busy machine it costs

SMALL = dict(size=(48, 24), parts=3, ids=4, visible=2, infrared=2, device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "The smallest embedded benchmark."
    return str(write_benchmark(tmp_path_factory.mktemp("data") / "tiny", preset="tiny"))


@pytest.fixture
def small(tiny):
    "A configuration that trains in a second."
    return lambda **changes: config("quick", **{**SMALL, "root": tiny, "steps": 4, "save_every": 2, **changes})


def files(run):
    "Digests of what must be the same to the bit."
    return [hashlib.sha256((Path(run) / name).read_bytes()).hexdigest() for name in ("model.safetensors", "log.csv")]


# --- fresh processes: forked from one that has imported everything and run nothing

FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["di2l.train", "accelerate", "torchvision"])


def _child(config, out, fault):
    "Train in a process of its own; `fault` is called first."
    torch.set_num_threads(1)
    if fault: fault()
    try: T.train(config, out, resume=True, quiet=True)
    except UserError as e:
        print(e, file=sys.stderr, flush=True)
        (Path(out).parent / "said.txt").write_text(str(e))
        os._exit(3)


def fresh(config, out, fault=None):
    "A started process."
    p = FRESH.Process(target=_child, args=(config, str(out), fault), daemon=True)
    p.start()
    return p


class DieWriting:
    "SIGKILL itself in the middle of the n-th file that is forced to the disk."
    def __init__(self, n): self.n = n

    def __call__(self):
        def write(path, data, left=[self.n]):
            left[0] -= 1
            with open(path, "wb") as f:
                if not left[0]:
                    f.write(data[:len(data) // 2]); f.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                f.write(data); f.flush(); os.fsync(f.fileno())
        F.write_synced = R.write_synced = write


class DieRenaming(DieWriting):
    "SIGKILL itself before the n-th folder is forced to the disk: just before or just after a rename."
    def __call__(self):
        def sync(path, left=[self.n]):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        F.sync_folder = R.sync_folder = sync


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    "A configuration and the run of it that nobody disturbed."
    c = config("quick", **{**SMALL, "root": tiny, "steps": 80, "save_every": 4})
    out = tmp_path_factory.mktemp("alone") / "run"
    p = fresh(c, out); p.join()
    assert p.exitcode == 0
    return c, out


def kill_soon(p, out, rng):
    "SIGKILL from outside: while it starts, or a moment after one of its next steps."
    log, wait = out / "log.csv", rng.randint(0, 6)
    lines = lambda: log.read_bytes().count(b"\n") if log.exists() else 0
    if not wait: p.join(rng.uniform(0, 0.5))
    began = lines()
    while wait and p.is_alive() and not began < lines():           # a resume may cut the log first
        began = min(began, lines()); time.sleep(0.002)
    while wait and p.is_alive() and lines() < began + wait: time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    p.kill(); p.join()


def test_killed_20_times_ends_with_the_same_bits(alone, tmp_path):
    c, undisturbed = alone
    rng, out, kills, inside = random.Random(0), tmp_path / "run", 0, 0
    while kills < 21:
        kind = kills % 3
        fault = [None, DieWriting(rng.randint(2, 5)), DieRenaming(rng.randint(2, 4))][kind]     # the first file is config.json
        p = fresh(c, out, fault)
        if kind: p.join(60)
        else: kill_soon(p, out, rng)
        assert p.exitcode == -signal.SIGKILL, f"over after {kills} kills; give the run more steps"
        kills, inside = kills + 1, inside + bool(kind)
    assert inside == 14
    p = fresh(c, out); p.join()
    assert p.exitcode == 0
    assert files(out) == files(undisturbed)
    assert not [*out.rglob(".*writing*"), *out.rglob(".*.tmp")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resuming_ends_with_the_same_bits(alone, tmp_path, number):
    c, undisturbed = alone
    out = tmp_path / "run"
    p = fresh(c, out)
    while not (out / "log.csv").exists() or (out / "log.csv").read_text().count("\n") < 8: time.sleep(0.02)
    os.kill(p.pid, number); p.join()
    assert p.exitcode == 3
    said = (tmp_path / "said.txt").read_text()
    assert said.startswith(signal.Signals(number).name) and "--resume" in said
    saved = R.load_checkpoint(out / "checkpoints")[1]["step"]
    assert f"after step {saved} of 80" in said
    p = fresh(c, out); p.join()
    assert files(out) == files(undisturbed)


class SmallDisk:
    "No file may grow beyond this many bytes from the second checkpoint on: writes fail as on a full disk."
    def __call__(self):
        save = T.save_checkpoint
        def full(folder, step, *rest):
            if step > 4: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            return save(folder, step, *rest)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        T.save_checkpoint = full


def test_a_full_disk_stops_with_a_message_and_leaves_the_last_checkpoint(alone, tmp_path):
    c, undisturbed = alone
    out = tmp_path / "run"
    p = fresh(c, out, SmallDisk()); p.join()
    assert p.exitcode == 3
    said = (tmp_path / "said.txt").read_text()
    assert "cannot be written" in said and "step-00000004 is intact" in said and "--resume" in said
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000004"]
    p = fresh(c, out); p.join()
    assert files(out) == files(undisturbed)


def test_a_folder_that_cannot_be_written_is_said(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"): T.train(small(), tmp_path / "file" / "run", quiet=True)


LOCKED = """
import os, sys
import torch
from di2l import train as T
from di2l.console import UserError
from di2l.runs.config import config
torch.set_num_threads(1)
root, out = sys.argv[1:]
save = T.save_checkpoint
def locked(folder, step, *rest):
    if step > 2: os.chmod(folder, 0o555)
    return save(folder, step, *rest)
T.save_checkpoint = locked
try: T.train(config("quick", root=root, size=(48, 24), ids=4, visible=2, infrared=2, device="cpu", steps=4, save_every=2), out, quiet=True)
except UserError as e: print(e); sys.exit(3)
"""


def test_a_folder_that_turns_read_only_is_said(tiny, tmp_path):
    "In a process that may not write what it is not allowed to: root may, unless the right to is taken from it."
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if powerless and not shutil.which("setpriv"): pytest.skip("this is root, who may write read-only folders, and setpriv (util-linux) is not here to forbid it")
    out = tmp_path / "run"
    done = subprocess.run([*powerless, sys.executable, "-c", LOCKED, tiny, str(out)], capture_output=True, text=True)
    os.chmod(out / "checkpoints", 0o755)
    assert done.returncode == 3 and "step-00000002 is intact" in done.stdout, done.stdout + done.stderr
    assert R.load_checkpoint(out / "checkpoints")[1]["step"] == 2


def test_other_images_are_not_resumed_on(small, tiny, tmp_path, monkeypatch):
    "Some training images become noise between saving and resuming."
    from PIL import Image
    root = shutil.copytree(tiny, tmp_path / "data")
    monkeypatch.setattr(T.Run, "_any", lambda run, caught: "SIGTERM" if run.step == 2 else None)
    with pytest.raises(P.Interrupted): T.train(small(root=str(root)), tmp_path / "run", quiet=True)
    records = T.Run(small(), "unused").dataset.train
    for path in records.path.iloc[::max(1, len(records) // 5)]:
        file = root / path
        size = Image.open(file).size
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(file)
    with pytest.raises(UserError, match="data_digest was"): T.train(small(root=str(root)), tmp_path / "run", True, True)
    assert R.load_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 2


# --- the same seed, another seed

def test_same_seed_same_bits_another_seed_other_weights(small, tmp_path):
    a, b, other = (T.train(small(seed=s), tmp_path / name, quiet=True) for s, name in ((0, "a"), (0, "b"), (1, "c")))
    assert files(a) == files(b)
    assert files(a)[0] != files(other)[0] and files(a)[1] != files(other)[1]


def test_a_run_leaves_its_record(small, tmp_path):
    c = small(hold_out=True)
    out = T.train(c, tmp_path / "run", quiet=True)
    about, summary, log = json.loads((out / "config.json").read_text()), json.loads((out / "summary.json").read_text()), read_log(out)
    assert about["config"] == json.loads(json.dumps(asdict(c)))
    assert about["method"] == dict(name="di2l", **c.settings) and about["precision"] in ("fp32", "bf16") and about["processes"] == 1
    assert log.step.tolist() == [0, 1, 2, 3] and np.allclose(log.focal + log.wrt, log.loss, rtol=1e-5)
    assert summary["steps"] == 4 and summary["last"]["step"] == 3
    net, info = R.load_network(out)
    assert info["num_ids"] == about["num_ids"] == net.num_ids
    whole = T.train(small(), tmp_path / "all", quiet=True)
    assert json.loads((whole / "config.json").read_text())["num_ids"] > about["num_ids"]          # the held-out identities are not trained on


def test_a_folder_with_a_run_is_not_trained_over(small, tmp_path):
    out = T.train(small(), tmp_path / "run", quiet=True)
    before = files(out)
    with pytest.raises(UserError, match="holds a run already"): T.train(small(), out)
    assert T.train(small(), out, resume=True, quiet=True) == out and files(out) == before
    with pytest.raises(UserError, match="lr was 0.004 and is 0.1"): T.train(small(lr=0.1), out, resume=True)
    (out / "summary.json").unlink()
    with pytest.raises(UserError, match="lr was 0.004 and is 0.1; gamma was 2.0 and is 1.0"): T.train(small(lr=0.1, gamma=1), out, resume=True, quiet=True)


def test_checkpoints_hold_no_code_and_two_are_kept(small, tmp_path):
    out = T.train(small(steps=7), tmp_path / "run", quiet=True)
    assert [p.name for p in R.checkpoints(out / "checkpoints")] == ["step-00000006", "step-00000007"]
    state = torch.load(out / "checkpoints/step-00000007/state.pt", weights_only=True)
    assert {"step", "optimisers", "random", "scaler", "fixed", "surroundings"} <= set(state)


# --- a folder that is not as it was left

def test_a_run_that_came_first_is_not_trained_over(small, tmp_path, monkeypatch):
    "Another process trains here after the folder was found empty and before it is locked."
    begin = T.Run.__init__
    def late(self, c, out):
        monkeypatch.undo()
        T.train(small(seed=1), out, quiet=True)
        before.extend(files(out))
        begin(self, c, out)
    for resume, said in ((False, "holds a run already"), (True, "seed was 1 and is 0")):
        before, out = [], tmp_path / str(resume)
        monkeypatch.setattr(T.Run, "__init__", late)
        with pytest.raises(UserError, match=said): T.train(small(), out, resume, quiet=True)
        assert files(out) == before


def test_home_is_expanded_in_every_path(small, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tiny)
    out = T.train(small(root="~/data"), "~/run", quiet=True)
    assert out == tmp_path / "run" and not (tmp_path / "~").exists()
    assert R.load_network("~/run")[1]["config"]["root"] == str(tmp_path / "data")
    assert R.summary("~/run")["steps"] == len(read_log("~/run")) == 4


def test_damaged_and_missing_files_of_a_run_are_named(small, tmp_path):
    out = T.train(small(), tmp_path / "run", quiet=True)
    other = T.train(small(seed=1), tmp_path / "other", quiet=True)
    assert R.summary(out)["sha256"] == files(out)[0]
    shutil.copy(other / "model.safetensors", out)                            # sound in itself
    with pytest.raises(UserError, match="model.safetensors: is not the file"): R.load_network(out)
    (out / "summary.json").write_text('{"steps": ')
    with pytest.raises(UserError, match="summary.json: is damaged"): T.train(small(), out, resume=True)
    with pytest.raises(UserError, match="summary.json: is damaged"): R.load_network(out)
    (out / "log.csv").write_text("")
    with pytest.raises(UserError, match="log.csv: cannot be read"): read_log(out)
    for name in "summary.json", "log.csv": (out / name).unlink()
    with pytest.raises(UserError, match="summary.json is not there"): R.summary(out)
    with pytest.raises(UserError, match="log.csv: cannot be read"): read_log(out)


def test_other_surroundings_are_said_and_kept(small, tmp_path, monkeypatch):
    c = small(steps=6)
    monkeypatch.setattr(T.Run, "_any", lambda run, caught: "SIGTERM" if run.step in (2, 4) else None)
    with pytest.raises(P.Interrupted): T.train(c, tmp_path, quiet=True)
    monkeypatch.setattr(T, "versions", lambda: dict(F.versions(), torch="3.0"))
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="after step 2 with threads 1 → 2, torch .* → 3.0"):
            with pytest.raises(P.Interrupted): T.train(c, tmp_path, resume=True, quiet=True)
        T.train(c, tmp_path, resume=True, quiet=True)                        # as before: nothing to say
    finally: torch.set_num_threads(1)
    here = F.versions()["torch"]
    assert R.summary(tmp_path)["resumed_with"] == [f"after step 2 with threads 1 → 2, torch {here} → 3.0"]


def test_a_killed_write_leaves_nothing_behind_after_the_next_start(small, tmp_path):
    c, out = small(), tmp_path / "run"
    p = fresh(c, out, DieWriting(1)); p.join()                               # in the middle of config.json
    assert len([*out.glob(".config.json.*.tmp")]) == 1
    (out / "checkpoints" / ".writing").mkdir(parents=True)
    (out / ".mine.tmp").write_text("a user's")
    p = fresh(c, out); p.join()
    assert p.exitcode == 0
    assert {q.name for q in out.rglob(".*")} == {".lock", ".mine.tmp"}


# --- numbers that go wrong

@dataclass(frozen=True)
class Sick(model.DI2LMethod):
    "DI2L with a third loss term that turns bad at the third batch."
    how: str = "nan"

    def losses(self, rows, batch, net=None, turn="main"):
        features = rows["features"]
        seen.append(0)
        bad = features.sum() * (torch.nan if self.how == "nan" else torch.inf) if len(seen) == 3 and self.how != "gradient" else features.sum() * 0
        if self.how == "gradient" and len(seen) == 3: bad = (features[0] * 0).square().sum().sqrt()        # 0, with an infinite derivative
        return dict(super().losses(rows, batch), extra=bad)


seen = []


@pytest.mark.parametrize("how,term", [("nan", "extra"), ("inf", "extra"), ("gradient", "the gradient of")])
def test_a_number_that_is_not_finite_stops_the_run(small, tmp_path, monkeypatch, how, term):
    seen.clear()
    monkeypatch.setitem(model.METHODS, "sick", Sick)
    c = small(method="sick", how=how)
    with pytest.raises(P.NonFinite, match=f"step 2: {term}"): T.train(c, tmp_path / "run", quiet=True)
    note = json.loads((tmp_path / "run" / "nonfinite.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    run = T.Run(small(), tmp_path / "other")
    assert note["visible_rows"] == [run.batches.rows(0)[0][2].tolist()] and note["infrared_rows"] == [run.batches.rows(0)[1][2].tolist()]
    assert R.load_checkpoint(tmp_path / "run" / "checkpoints")[1]["step"] == 2


# --- several processes

def _rank(rank, world, port, target, args):
    "A process as a launcher starts it."
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    target(*args)


def together(world, target, *args, check=True):
    "Run `target` in `world` gloo processes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [FRESH.Process(target=_rank, args=(r, world, port, target, args), daemon=True) for r in range(world)]
    for p in ranks: p.start()
    for p in ranks: p.join(300)
    assert not check or [p.exitcode for p in ranks] == [0] * world


def _one_batch(config, file):
    "Loss terms and gradients of one batch, batch normalisation by its running statistics."
    run = T.Run(config, "unused")
    for m in run.network.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    scalars, _, _ = run.forward_backward(0, 1)
    B.add_gradients(run.network, [p for p in run.network.parameters() if p.grad is not None], run.method.joint)
    gradients = {n: p.grad for n, p in run.network.named_parameters() if p.grad is not None}
    if run.rank == 0: torch.save(dict(scalars=scalars, gradients=gradients), file)


def test_2_and_4_processes_compute_what_one_does(small, tmp_path):
    c, results = small(precision="fp32", ids=8), []
    for world in 1, 2, 4:
        together(world, _one_batch, c, tmp_path / f"{world}.pt")
        results.append(torch.load(tmp_path / f"{world}.pt"))
    one = results[0]
    assert max(g.abs().max() for g in one["gradients"].values()) > 0.01
    for many in results[1:]:
        for name in one["scalars"]: torch.testing.assert_close(many["scalars"][name], one["scalars"][name], rtol=1e-6, atol=1e-6)
        assert one["gradients"].keys() == many["gradients"].keys()
        for name in one["gradients"]: torch.testing.assert_close(many["gradients"][name], one["gradients"][name], rtol=0, atol=1e-6, msg=lambda m: f"{name}: {m}")


def _train_until(config, out, step):
    "Train as the launcher's processes do, and die at `step` if there is one."
    one_step = T.Run.one_step
    def dying(self):
        if self.step == step: os.kill(os.getpid(), signal.SIGKILL)
        one_step(self)
    T.Run.one_step = dying
    T.train(config, out, resume=True, quiet=True)


def test_2_processes_killed_and_resumed_end_as_torchrun_does(small, tmp_path):
    c = small(steps=6)
    words = [f"--{k}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in {**SMALL, "root": c.root, "save_every": 2, "steps": 6, "out": tmp_path / "a"}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", sys.executable, "-c", "from di2l.commands import train; train()", *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout and done.stdout.count("Done.") == 1
    together(2, _train_until, c, tmp_path / "b", 3, check=False)              # dies
    together(2, _train_until, c, tmp_path / "b", -1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert json.loads((tmp_path / "a/summary.json").read_text())["processes"] == 2


def test_shares_are_the_samplers_and_disjoint(small):
    from di2l.data.records import IdentitySampler
    run = T.Run(small(), "unused")
    visible, infrared = (r[0] for r in run.batches.rows(0))
    for world in 2, 4:
        own, order = B.shares(run.method.groups, dict(visible=len(visible), infrared=len(infrared)), world)
        for rank, (v, i) in enumerate(zip(own["visible"], own["infrared"])):
            shard = IdentitySampler(run.dataset.train, 4, 2, 2, seed=0, rank=rank, world=world).epoch(0)[0]
            assert visible.repeat(2)[v].tolist() == [*shard[0], *shard[0]] and infrared[i].tolist() == shard[1].tolist()
        assert sorted(own["visible"].flatten().tolist()) == list(range(2 * len(visible)))
    with pytest.raises(UserError, match="ids = 4 cannot be shared by 3"): T.Batches(run.c, run.method, run.dataset, None, run.device, 0, 3)


def test_batches_in_an_earlier_batchs_memory_are_those_in_fresh_memory(small):
    run = T.Run(small(), "unused")
    fresh, again = (T.Batches(run.c, run.method, run.dataset, run.batches.images.__self__, run.device, reuse=r) for r in (False, True))
    places = set()
    for batch in range(3):
        (a, _), (b, _) = fresh(0, batch), again(0, batch)
        assert all(torch.equal(a[k], b[k]) for k in a)
        places.add((again.raw[0].data_ptr(), again.last["visible"].data_ptr()))
    assert len(places) == 1 and fresh.last is None


def test_two_trainings_in_one_folder_are_refused(small, tmp_path):
    with F.locked(tmp_path / ".lock"):
        with pytest.raises(UserError, match="by another process"): T.train(small(), tmp_path, quiet=True)
    assert torch.tensor(1e-40) * 0.5 > 0                                           # the refused one left the processor as it was
    T.train(small(), tmp_path, quiet=True)
    assert torch.tensor(1e-40) * 0.5 > 0


def test_momentum_is_defined_after_a_first_step_that_fp16_skips(small):
    "A loss scale that overflows skips the step; the next one, with a gradient of zero, must not move anything."
    net = nn.Linear(3, 3)
    optimiser = T.make_optimiser(small(optimiser="sgd", weight_decay=0), model.DI2LMethod(), net)
    before, scaler = [p.clone() for p in net.parameters()], torch.amp.GradScaler("cpu")
    for gradient in (float("inf"), 0.0):
        for p in net.parameters(): p.grad = torch.full_like(p, gradient)
        scaler.scale(torch.zeros(())); scaler.step(optimiser); scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_batch_statistics_stay_while_a_block_is_recomputed():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    plain = nn.Sequential(nn.BatchNorm2d(3)).train()
    with P._statistics_left_alone(block), P._statistics_left_alone(plain):
        assert block[0].num_batches_tracked is not None                       # SyncBatchNorm refuses to run without
        plain(torch.randn(4, 3, 2, 2))
    assert plain[0].num_batches_tracked == 0 and plain[0].running_mean.abs().sum() == 0 and plain[0].momentum == 0.1


def test_a_later_run_may_have_another_device(small):
    from accelerate.state import PartialState
    P.make_accelerator(small())
    PartialState._shared_state["device"] = torch.device("meta")                 # what an earlier run on another device leaves
    assert P.make_accelerator(small()).device.type == "cpu"


FREED = """
import resource, torch
from di2l.train import keep_freed_memory
def resident(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)                                                      # 200 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults(); empty = resident()
took = keep_freed_memory(); again, full = min(faults() for step in range(6)), resident()   # (an early step may leave a gap too small for the next)
keep_freed_memory(False)
print(took, usual, again, round(full - empty), round(resident() - empty))
"""


def test_memory_is_kept_from_step_to_step_and_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    took, usual, again, kept, left = done.stdout.split()
    if took == "False": pytest.skip("this system's C library has no mallopt")
    assert int(usual) > 50 * max(1, int(again)) or int(usual) < 500               # (large pages make either cheap)
    assert int(kept) > 150 and int(left) < 50


def test_auto_takes_bf16_only_where_the_gpu_has_it(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert P.choose_precision(small(), torch.device("cuda")) == "fp16"


def test_a_lost_log_is_said_and_begun_again(small, tmp_path):
    c, raised = small(steps=4), []
    old, T.Run._any = T.Run._any, lambda run, caught: "SIGTERM" if run.step == 2 else None
    try:
        with pytest.raises(P.Interrupted): T.train(c, tmp_path, quiet=True)
    finally: T.Run._any = old
    (tmp_path / "log.csv").unlink()
    with pytest.warns(UserWarning, match="scalars of earlier steps are lost"): T.train(c, tmp_path, resume=True, quiet=True)
    assert read_log(tmp_path).step.tolist() == [2, 3] and b"\0" not in (tmp_path / "log.csv").read_bytes()


# --- what the options do

CHANGES = [dict(optimiser="sgd"), dict(lr=1e-3), dict(head_lr=3), dict(weight_decay=0.5), dict(schedule="steps"), dict(warmup=0.5), dict(clip=0.01), dict(seed=3),
           dict(precision="fp32"), dict(precision="bf16"), dict(accumulate=2), dict(ids=3), dict(visible=3), dict(infrared=3), dict(size=(40, 24)), dict(hold_out=True), dict(steps=5),
           dict(method="caj"), dict(erase=0.9)]


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    "Weights that a two-step run ends with."
    def weights(**changes):
        c = config("quick", **{**SMALL, "root": tiny, "steps": 2, **changes})
        return (T.train(c, tmp_path_factory.mktemp("option") / "run", quiet=True) / "model.safetensors").read_bytes()
    return lambda **changes: hashlib.sha256(weights(**changes)).hexdigest(), hashlib.sha256(weights()).hexdigest()


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_every_option_changes_something(base, change):
    weights, plain = base
    if change in (dict(precision="fp32"), dict(precision="bf16")) and P.choose_precision(config("quick"), torch.device("cpu")) == change["precision"]: pytest.skip("what auto stands for here")
    assert weights(**change) != plain


def test_sgd_options_change_something(base):
    weights, _ = base
    sgd = weights(optimiser="sgd")
    assert weights(optimiser="sgd", momentum=0.5) != sgd
    steps = weights(optimiser="sgd", schedule="steps", epochs=2, steps=0)
    assert weights(optimiser="sgd", schedule="steps", epochs=2, steps=0, milestones=(1,)) != steps
    assert weights(optimiser="sgd", schedule="steps", epochs=1, steps=0) != steps


def test_accumulation_averages_gradients(small):
    run = T.Run(small(accumulate=2), "unused")
    norms = [m for m in run.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms: m.eval()
    grads = []
    for batch in 0, 1:
        run.steppers["main"].zero_grad()
        run.forward_backward(0, batch)
        grads.append([p.grad.clone() * 2 for p in run.network.parameters() if p.grad is not None])
    run.one_step()
    for p, a, b in zip((p for p in run.network.parameters() if p.grad is not None), *grads): torch.testing.assert_close(p.grad, (a + b) / 2)


def test_checkpointing_keeps_less_and_changes_nothing(small, base):
    weights, _ = base
    assert weights(checkpointing=True, precision="fp32") == weights(precision="fp32")
    kept = []
    for on in False, True:
        run, total = T.Run(small(checkpointing=on), "unused"), 0
        def note(t):
            nonlocal total; total += t.numel() * t.element_size(); return t
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): run.forward_backward(0, 0)
        kept.append(total)
    assert kept[1] < kept[0]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_network_computes_the_same(small, tmp_path):
    plain, compiled = (read_log(T.train(small(steps=2, precision="fp32", non_local=False, compile=c), tmp_path / str(c), quiet=True)) for c in (False, True))
    assert np.allclose(plain, compiled, rtol=1e-3, atol=1e-6, equal_nan=True)              # gauges of what adds nothing yet: NaN
    from torch._dynamo.utils import counters
    assert counters["stats"]["unique_graphs"] > 0                            # a compiler was at work


def test_a_notebooks_launcher_runs_it(small, tmp_path):
    from accelerate import notebook_launcher
    notebook_launcher(T.train, (small(), tmp_path / "launched", False, True), num_processes=1)
    assert files(tmp_path / "launched") == files(T.train(small(), tmp_path / "called", quiet=True))


# --- configuration

def test_presets():
    paper = config("paper-sysu")
    assert (paper.lr, paper.epochs, paper.milestones, paper.size, paper.ids, paper.visible, paper.infrared, paper.optimiser) == (0.01, 120, (20, 50), (288, 144), 8, 4, 4, "sgd")
    assert config("paper-regdb").dataset == "regdb"
    caj, agw = config("caj"), config("agw")
    for c in caj, agw: assert (c.lr * c.head_lr, c.lr, c.momentum, c.weight_decay, c.warmup) == (pytest.approx(0.1), 0.01, 0.9, 5e-4, 10)
    assert caj.settings["rca"] and caj.settings["squared"] and not agw.settings["rca"] and not agw.settings["squared"]
    for c in paper, caj, agw:
        text = show_config(c)
        for f in fields(c): assert f.name in text or f.name == "settings"
        for name in c.settings: assert f"{c.method}.{name}" in text


def test_baselines_learning_rate_is_the_published_one():
    c = config("agw")
    published = lambda e: 0.01 * ((e + 1) / 10 if e < 10 else 1 if e < 20 else 0.1 if e < 50 else 0.01)
    for e in range(81):
        for step in (0, 395): assert c.lr * T.learning_rate(c, e * 396 + step, 396, 81 * 396) == pytest.approx(published(e))


def test_heads_learn_at_their_own_rate(small):
    run = T.Run(small(head_lr=10.0, lr=1e-3), "unused")
    rates = {id(p): g["rate"] for g in run.optimisers["main"].param_groups for p in g["params"]}
    for name, p in run.network.named_parameters():
        if p.requires_grad: assert rates[id(p)] == pytest.approx(1e-2 if name.startswith(("bn_neck.", "classifier.")) else 1e-3)
    assert len(rates) == sum(p.requires_grad for p in run.network.parameters())


@pytest.mark.parametrize("change,said", [
    (dict(gama=1), "did you mean 'gamma'"), (dict(learning_rate=1), "no option"), (dict(lr="fast"), "lr = 'fast' is not a number"), (dict(lr=True), "not a number"),
    (dict(ids=2.5), "whole number"), (dict(ids=1), "2 or more"), (dict(lr=0), "above 0"), (dict(lr=float("nan")), "above 0"), (dict(size=(96,)), "height and width"),
    (dict(schedule="cosin"), "did you mean 'cosine'"), (dict(method="cja"), "did you mean 'caj'"), (dict(epochs=0, steps=0), "1 or more"),
    (dict(momentum=0.5), "momentum does nothing with optimiser = 'adamw'"), (dict(milestones=(3,)), "milestones does nothing"), (dict(trial=2), "only regdb has trials"),
    (dict(compile="perhaps"), "true or false"), (dict(weight_decay=-1), "0 or more"), (dict(gamma="two"), "gamma = 'two' is not a number"),
    (dict(dpa=False, parts=6), "parts does nothing with dpa = False"), (dict(method="caj", reading="weighted-sum"), "reading does nothing"), (dict(crop=0, pad=30), "pad does nothing"),
    (dict(seed=10**30), "under 2"), (dict(warmup=float("inf")), "under 2"), (dict(gamma=-1), "gamma = -1.0: expected"), (dict(parts=0), "parts = 0"), (dict(gem=0), "gem = 0.0"),
    (dict(part_form="unit+norm"), "norm' does nothing"), (dict(flip=2), "flip = 2.0"), (dict(flip=float("nan")), "flip = nan"), (dict(wrt_scale=0), "above 0"), (dict(settings="x"), "by its own name"),
    (dict(compile=True, checkpointing=True), "take one of the two"), (dict(settings=dict(gama=1)), "did you mean 'gamma'")])
def test_a_wrong_option_is_an_error_that_helps(change, said):
    with pytest.raises(UserError, match=said): config("quick", **change)


def test_text_is_read_as_the_fields_type():
    c = config("quick", lr="1e-2", size="144x72", schedule="steps", milestones="5,9", compile="true", gamma="0", wrt_scale="none", hold_out=True)
    assert (c.lr, c.size, c.milestones, c.compile, c.settings["gamma"], c.settings["wrt_scale"]) == (0.01, (144, 72), (5, 9), True, 0.0, None)


def test_epochs_take_the_place_of_steps():
    assert (config("quick").steps, config("quick", epochs=3).steps, config("quick", epochs=3, steps=9).steps) == (600, 0, 9)


def test_fp16_needs_a_gpu(small):
    with pytest.raises(UserError, match="fp16"): T.Run(small(precision="fp16"), "unused")


# --- a GPU, where there is one

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_sees_the_same_batches_and_learns(small, tmp_path):
    gpu, cpu = (T.Run(small(device=d, precision="fp32"), "unused") for d in ("cuda", "cpu"))
    for a, b in zip(gpu.batches(0, 1)[0].values(), cpu.batches(0, 1)[0].values()): torch.testing.assert_close(a.cpu(), b)
    for a, b in zip(gpu.forward_backward(0, 1)[0].values(), cpu.forward_backward(0, 1)[0].values()): torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
    out = T.train(small(device="cuda", steps=45, save_every=20), tmp_path / "run", quiet=True)
    log = read_log(out)
    assert len(log) == 45 and log.loss.tail(5).mean() < log.loss.head(5).mean()
    (out / "summary.json").unlink(); import shutil; shutil.rmtree(out / "checkpoints/step-00000045")
    assert len(read_log(T.train(small(device="cuda", steps=45, save_every=20), out, resume=True, quiet=True))) == 45
