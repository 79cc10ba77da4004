"What CDP remembers, `memory.hardness`: resumed runs and several processes draw the same spectra (`32_cdp`)."
import multiprocessing, os, socket

import pytest
import torch

from di2l import train as T
from di2l.methods import cdp
from di2l.runs.config import config
from di2l.runs.folder import load_checkpoint
from di2l.synthetic.benchmark import write_benchmark

FRESH = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return str(write_benchmark(tmp_path_factory.mktemp("cdp") / "tiny", preset="tiny"))


def settings(root, **changes):
    return config("quick", **{**dict(method="cdp", root=root, size=(32, 16), ids=4, visible=2, infrared=2, steps=6,
                                     device="cpu", precision="fp32"), **changes})


def test_resumed_it_draws_the_same_spectra(root, tmp_path):
    torch.set_num_threads(1)
    T.train(settings(root, save_every=6), tmp_path / "whole", quiet=True)
    (tmp_path / "parts").mkdir()
    first = T.Run(settings(root, save_every=1), tmp_path / "parts")
    first.log = T.Log(tmp_path / "parts")
    for _ in range(3):
        first.one_step()
        first.log.write(first.read())
    first.save()
    T.train(settings(root, save_every=1), tmp_path / "parts", resume=True, quiet=True)
    for name in "model.safetensors", "log.csv":
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    whole, parts = (load_checkpoint(tmp_path / run / "checkpoints")[0]["memory.hardness"] for run in ("whole", "parts"))
    assert torch.equal(whole, parts) and (whole != 1).any()


def _steps(rank, world, port, c, file):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = T.Run(c, "unused")
    for module in run.network.modules():                              # statistics of half a batch are not the whole's
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm): module.eval()
    for _ in range(3): run.one_step()
    if rank == 0: torch.save((run.network.state_dict(), run.read()), file)


def test_2_processes_are_one(root, tmp_path):
    "With the normalisations at rest, since on the CPU each process has its own statistics."
    for world in 1, 2:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        c = settings(root, optimiser="sgd", lr=0.01, clip=0.0)
        ranks = [FRESH.Process(target=_steps, args=(r, world, port, c, tmp_path / f"{world}.pt")) for r in range(world)]
        for p in ranks: p.start()
        for p in ranks: p.join(300)
        assert [p.exitcode for p in ranks] == [0] * world
    (one, rows), (two, others) = (torch.load(tmp_path / f"{world}.pt", weights_only=False) for world in (1, 2))
    for name in one: torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
    assert (one["memory.hardness"] != 1).any()
    for a, b in zip(rows, others):
        for k in a: assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5, nan_ok=True), k


def test_a_loss_that_is_not_finite_leaves_the_memory():
    hardness = torch.ones(9)
    cdp.update_hardness(hardness, torch.tensor([1.0, float("inf")]), torch.tensor([2, 3]), 0.1)
    assert hardness.eq(1).all()
