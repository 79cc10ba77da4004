"What CDP remembers, `memory.hardness` (`32_cdp`); that resumed runs and several processes agree on it is in `test_all_methods`."
import torch

from di2l import train as T
from di2l.methods import cdp
from di2l.runs.config import config
from di2l.synthetic.benchmark import write_benchmark


def test_the_losses_of_a_step_move_the_memory_and_with_it_the_draw(tmp_path):
    root = str(write_benchmark(tmp_path / "tiny", preset="tiny"))
    common = dict(method="cdp", root=root, size=(32, 16), ids=4, visible=2, infrared=2, steps=6, device="cpu", precision="fp32")
    run = T.Run(config("quick", **common), "unused")
    run.one_step()
    hardness = run.network.memory.hardness
    assert (hardness != 1).any() and (hardness == 1).sum() == 9 - len({*run.batches(0, 0)[0]["which@spectra"].tolist()})
    hardness.copy_(torch.tensor([0.0] * 4 + [1.0] + [0.0] * 4))
    assert (run.batches(0, 1, run.network)[0]["which@spectra"] == 4).all()


def test_a_loss_that_is_not_finite_leaves_the_memory():
    hardness = torch.ones(9)
    cdp.update_hardness(hardness, torch.tensor([1.0, float("inf")]), torch.tensor([2, 3]), 0.1)
    assert hardness.eq(1).all()
