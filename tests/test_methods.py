"What a method may be, and what the loop makes of it: groups, turns, joint modules, memory (`79_method`, `80_batches`, `08_train`)."
import json, math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from di2l import model, train as T
from di2l.console import UserError
from di2l.methods.method import Batch
from di2l.rca import normalise
from di2l.runs import batches as B
from di2l.runs.config import config
from di2l.runs.draws import named_draws
from di2l.runs.log import read_log
from di2l.synthetic.benchmark import write_benchmark
from processes import by_processes


class Net(nn.Module):
    "A small embedding; a third group of rows made inside; a joint module; a discriminator of its own turn; a memory."
    def __init__(self, num_ids):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 16, 16))
        self.classifier = nn.Linear(16, num_ids)
        self.mixer = nn.Linear(16, 16)                     # joint: applied to the rows of the whole batch
        self.judge = nn.Linear(16, 1)
        self.memory = nn.Module()
        self.memory.register_buffer("mean", torch.zeros(16))
        self.memory.register_buffer("epochs", torch.zeros((), dtype=torch.long))

    def forward(self, visible=None, infrared=None, noise=None, turn="main", **views):
        if not self.training: return F.normalize(self.trunk(visible if visible is not None else infrared))
        grey = self.trunk(visible.mean(1, keepdim=True).expand_as(visible)) + views["noise@grey"]
        features = torch.cat([self.trunk(visible), grey, self.trunk(infrared)])
        if turn == "judge": return {"score": self.judge(features.detach())[:, 0]}
        return {"features": features, "logits": self.classifier(features), "grey@grey": grey}


@dataclass(frozen=True)
class Toy(model.Method):
    scale: float = 1.0
    groups = dict(visible=("visible", 1), grey=("visible", 1), infrared=("infrared", 1))
    joint, passing = ("mixer",), ("judge", "mixer")
    columns = ("main.id", "main.mixed", "main.grey", "main.loss", "main.accuracy", "main.grad_norm",
               "judge.real", "judge.loss", "judge.grad_norm")

    def network(self, num_ids): return Net(num_ids)

    def augment(self, visible, infrared, draw=named_draws(0), out=None, net=None):
        noise = torch.randn(len(visible), 16, generator=draw("noise"))
        return {"visible": normalise(visible / 255.), "infrared": normalise(infrared / 255.), "noise@grey": noise}

    def turns(self, when): return ("judge", "main") if when.step % 2 else ("main",)

    def players(self, net): return dict(main=("trunk", "classifier", "mixer"), judge=("judge",))

    def losses(self, rows, batch, net=None, turn="main"):
        if turn == "judge": return dict(real=rows["score"].square().mean())
        assert rows["grey@grey"].shape[0] == batch.of["grey"].stop - batch.of["grey"].start
        drop = torch.rand(len(batch.pids), 1, generator=batch.draw("drop")) < 0.5
        mixed = net.mixer(rows["features"].mean(0, keepdim=True) + rows["features"] * drop) - net.memory.mean
        return dict(id=F.cross_entropy(rows["logits"], batch.pids), mixed=self.scale * mixed.square().mean(),
                    grey=(rows["features"][batch.of["grey"]] - rows["grey@grey"]).abs().sum())

    def after_step(self, net, batch, rows):
        net.memory.mean.lerp_(rows["main"]["features"].mean(0), 0.1)
        net.memory.epochs += batch.when.epoch_ends


@pytest.fixture(scope="module")
def root(tmp_path_factory): return str(write_benchmark(tmp_path_factory.mktemp("toy") / "tiny", preset="tiny"))


@pytest.fixture
def toy(root, monkeypatch):
    monkeypatch.setitem(model.METHODS, "toy", Toy)
    torch.set_num_threads(1)
    return lambda **changes: config("quick", **{**dict(method="toy", root=root, size=(32, 16), ids=4, visible=2, infrared=2, steps=8, save_every=2,
                                                       device="cpu", precision="fp32"), **changes})


def test_turns_have_their_own_columns_and_empty_cells(toy, tmp_path):
    log = read_log(T.train(toy(), tmp_path / "run", quiet=True))
    assert [*log.columns] == ["step", "epoch", "lr", *Toy.columns, "features.over_images"]
    assert log["judge.loss"].isna().tolist() == [True, False] * 4 and log["main.loss"].notna().all()
    assert (log["main.grey"] == 0).all()                               # one group's rows are the whole batch's of that group
    assert torch.allclose(torch.tensor((log["main.id"] + log["main.mixed"]).values), torch.tensor(log["main.loss"].values), rtol=1e-5)
    last = json.loads((tmp_path / "run/summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))["last"]
    assert last["step"] == 7 and "judge.loss" in last


def test_a_turn_moves_its_player_only(toy):
    run = T.Run(toy(), "unused")
    def snapshot(): return {n: p.detach().clone() for n, p in run.network.named_parameters()}
    for step in range(2):
        before = snapshot()
        run.one_step()
        moved = {n.split(".")[0] for n, p in snapshot().items() if not torch.equal(p, before[n])}
        assert moved == ({"trunk", "classifier", "mixer"} if step == 0 else {"trunk", "classifier", "mixer", "judge"})
    run.take_turn("judge", 1.0, run.batches(0, 0))
    assert {n.split(".")[0] for n, p in run.network.named_parameters() if p.requires_grad} == {"judge"}


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_resumed_after_any_turn_it_ends_with_the_same_bytes(toy, tmp_path, after):
    "Weights, what the network remembers, and the log; the parts that retrieval does not need are not in the weights."
    T.train(toy(), tmp_path / "whole", quiet=True)
    first = T.Run(toy(save_every=1), tmp_path / "parts")
    (tmp_path / "parts").mkdir()
    first.log = T.Log(tmp_path / "parts")
    for _ in range(after):
        first.one_step()
        first.log.write(first.read())
    first.save()
    T.train(toy(save_every=1), tmp_path / "parts", resume=True, quiet=True)
    for name in "model.safetensors", "log.csv": assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    from safetensors.torch import load_file
    kept = load_file(tmp_path / "whole/model.safetensors")
    assert {n.split(".")[0] for n in kept} == {"trunk", "classifier", "memory"} and kept["memory.mean"].any()


def four_steps(c):
    model.METHODS["toy"] = Toy
    run = T.Run(c, "unused")
    for _ in range(4): run.one_step()
    return run.network.state_dict(), run.read()


def test_2_processes_are_one_with_groups_turns_joint_modules_and_draws(toy, tmp_path):
    (one, rows), (two, others) = (by_processes(world, tmp_path, four_steps, toy(optimiser="sgd", lr=0.1)) for world in (1, 2))
    for name in one: torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}: {m}")
    for a, b in zip(rows, others):
        assert a.keys() == b.keys()
        for k in a: assert a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6, nan_ok=True), k


def test_a_joint_modules_gradient_is_not_multiplied(toy, tmp_path):
    "What DistributedDataParallel does to it: the sum of two whole gradients. Here the mixer moves as in one process (above), and is exempt."
    layer = nn.ModuleDict(dict(mixer=nn.Linear(2, 2), trunk=nn.Linear(2, 2)))
    assert [n for n in Toy.joint if n in layer] == ["mixer"]
    for p in layer.parameters(): p.grad = torch.ones_like(p)
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    real, seen = dist.all_reduce, []
    try:
        dist.all_reduce = lambda t: (seen.append(t.numel()), t.mul_(2))
        B.add_gradients(layer, list(layer.parameters()), ("mixer",))
    finally:
        dist.all_reduce = real
        dist.destroy_process_group()
    assert seen == [6] and (layer["mixer"].weight.grad == 1).all() and (layer["trunk"].weight.grad == 2).all()


def test_a_view_of_no_group_is_refused_by_name(toy, monkeypatch):
    c = toy()
    run = T.Run(c, "unused")
    part = B.Batches(c, run.method, run.dataset, run.batches.images.__self__, run.device, 0, 2)
    assert {n: len(v) for n, v in part(0, 0)[0].items()} == {"visible": 4, "infrared": 4, "noise@grey": 4}
    plain = Toy.augment
    monkeypatch.setattr(Toy, "augment", lambda self, *a, **k: {**plain(self, *a, **k), "edges": torch.zeros(8, 2)})
    with pytest.raises(UserError, match="view 'edges' belongs to no group of rows .visible, grey, infrared."): part(0, 0)


@pytest.mark.parametrize("change", [dict(accumulate=2), dict(compile=True)])
def test_what_cannot_go_with_several_turns_is_refused(toy, change):
    with pytest.raises(UserError, match="not with a method of several turns"): T.Run(toy(**change), "unused")


@pytest.mark.parametrize("key", ["main.id", "judge.real"])
def test_a_nan_names_turn_and_term(toy, tmp_path, monkeypatch, key):
    turn, term = key.split(".")
    real = Toy.losses
    def losses(self, rows, batch, net=None, turn="main"):
        terms = real(self, rows, batch, net, turn)
        if batch.when.step == 3 and term in terms: terms[term] = terms[term] * math.nan
        return terms
    monkeypatch.setattr(Toy, "losses", losses)
    with pytest.raises(T.NonFinite, match=f"step 3: {key} is not finite"): T.train(toy(), tmp_path / "run", quiet=True)


def test_two_methods_with_one_seed_share_trunk_batches_and_views(root):
    "To the bit: what one has and the other lacks moves no draw of what both have."
    common = dict(root=root, size=(32, 16), ids=4, visible=2, infrared=2, steps=4, device="cpu", precision="fp32", backbone="resnet10")
    full, bare = (T.Run(config("quick", **common, **changes), "unused") for changes in (
        dict(pixel_form="unit", parts=1), dict(dpa=False, non_local=False, rca=False)))
    weights, others = full.network.state_dict(), bare.network.state_dict()
    assert len(others) > 40 and all(torch.equal(w, weights[n]) for n, w in others.items()) and weights.keys() > others.keys()
    for epoch, batch in ((0, 0), (0, 2), (1, 1)):
        a, b = full.batches(epoch, batch)[0], bare.batches(epoch, batch)[0]
        assert torch.equal(a["infrared"], b["infrared"]) and torch.equal(a["visible"][:8], b["visible"])


def test_draws_in_order_are_another_run(root):
    common = dict(root=root, size=(32, 16), ids=4, visible=2, infrared=2, steps=4, device="cpu", precision="fp32", backbone="resnet10", parts=1)
    named, ordered = (T.Run(config("quick", **common, draws=d), "unused") for d in ("named", "in-order"))
    assert not torch.equal(named.network.classifier.weight, ordered.network.classifier.weight)
    assert not torch.equal(named.batches(0, 0)[0]["infrared"], ordered.batches(0, 0)[0]["infrared"])


def test_a_finished_run_is_loaded_without_what_retrieval_does_not_need(toy, tmp_path):
    from di2l.runs.folder import load_network
    run = T.train(toy(), tmp_path / "run", quiet=True)
    net, _ = load_network(run)
    images = torch.randn(2, 3, 32, 16)
    assert torch.allclose(net(visible=images).norm(dim=1), torch.ones(2)) and net.memory.mean.any()
    from safetensors.torch import load_file, save_file
    weights = load_file(run / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != "trunk.1.bias"}, run / "model.safetensors")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="trunk.1.bias is in one of them only"): load_network(run)
