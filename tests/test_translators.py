"AlignGAN, TS-GAN and D²RL in the loop: phases, turns, resume, processes, what is refused (`12_translators`, `31`, `33`, `37`)."
import math, resource

import pytest
import torch
from torch import nn

from di2l import train as T
from di2l.console import UserError
from di2l.methods import aligngan, d2rl, tsgan
from di2l.methods.translators import PatchJudge, halvings
from di2l.model import METHODS
from di2l.runs.config import config
from di2l.runs.folder import load_network
from di2l.runs.log import read_log
from di2l.synthetic.benchmark import write_benchmark
from processes import by_processes

NAMES = ("aligngan", "tsgan", "d2rl")
PHASES = dict(aligngan=[("warm",), *[("pixel", "twins")] * 2, *[("feature", "generator", "judges")] * 2],
              tsgan=[*[("generator", "judges")] * 2, ("teacher",), *[("student",)] * 2],
              d2rl=[*[("translate", "judges")] * 2, *[("refine", "judges", "feature")] * 3])


@pytest.fixture(scope="module")
def root(tmp_path_factory): return str(write_benchmark(tmp_path_factory.mktemp("gan") / "tiny", preset="tiny"))


@pytest.fixture(scope="module")
def tiny(root):
    torch.set_num_threads(1)
    common = dict(root=root, size=(32, 16), ids=4, visible=2, infrared=2, steps=5, save_every=1, width=2, blocks=1,
                  shrink=2, gan_lr=1e-3, device="cpu", precision="fp32")
    return lambda name, **changes: config("quick", **{**common, "method": name, **changes})


@pytest.fixture(scope="module", params=NAMES)
def trained(request, tiny, tmp_path_factory):
    "(Name, folder of a whole run.)"
    return request.param, T.train(tiny(request.param), tmp_path_factory.mktemp("gan") / "whole", quiet=True)


def test_phases_are_shares_of_the_run_and_columns_are_declared(trained, tiny):
    name, run = trained
    log, method = read_log(run), METHODS[name](**tiny(name).settings)
    turns = {t for phase in PHASES[name] for t in phase}
    found = [{t for t in turns if not math.isnan(row[f"{t}.loss"])} for _, row in log.iterrows()]
    assert found == [set(phase) for phase in PHASES[name]]
    assert set(method.columns) <= set(log.columns) and not [c for c in log.columns if "." in c and c not in method.columns and c.split(".")[0] in turns]
    assert log[[c for c in method.columns]].notna().any().all()


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_resumed_in_any_phase_it_ends_with_the_same_bytes(trained, tiny, tmp_path, after):
    name, whole = trained
    first = T.Run(tiny(name), tmp_path)
    first.log = T.Log(tmp_path)
    for _ in range(after):
        first.one_step()
        first.log.write(first.read())
    first.save()
    T.train(tiny(name), tmp_path, resume=True, quiet=True)
    for file in "model.safetensors", "log.csv": assert (whole / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_a_finished_run_is_read_without_what_retrieval_does_not_need(trained):
    "Its evaluation is deterministic, and no image depends on its neighbours."
    name, run = trained
    from safetensors.torch import load_file
    kept = {n.split(".")[0] for n in load_file(run / "model.safetensors")}
    assert not kept & set(METHODS[name].passing)
    net, _ = load_network(run)
    images = torch.randn(5, 3, 32, 16)
    with torch.no_grad():
        for modality in ("visible", "infrared"):
            features = net(**{modality: images})
            torch.testing.assert_close(features, net(**{modality: images}), rtol=0, atol=0)
            torch.testing.assert_close(features[1:2], net(**{modality: images[1:2]}), rtol=1e-4, atol=1e-5)
            assert (features.norm(dim=1) - 1).abs().max() < 1e-5
            assert net.embed(**{modality: images})[2].shape == (5, net.num_ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_moves_its_player_only_and_together_they_move_everything(tiny, name):
    run = T.Run(tiny(name), "unused")
    run.step = 4                                                            # the rate has warmed up
    views, moved = run.batches(0, 0, run.network), set()
    for turn, player in run.method.players(run.network).items():
        before = {n: p.detach().clone() for n, p in run.network.named_parameters()}
        run.take_turn(turn, 1.0, views)
        now = {n for n, p in run.network.named_parameters() if not torch.equal(p, before[n])}
        assert {n.split(".")[0] for n in now} == set(player), turn
        moved |= now
    idle = {n for n, p in run.network.named_parameters()} - moved
    assert idle <= {"bn_neck.bias", "teacher_neck.bias"}, idle              # a neck has no shift


def test_the_joint_discriminators_are_fresh_and_the_step_is_forgotten(tiny):
    run = T.Run(tiny("aligngan"), "unused")
    def judges(): return [p.detach().clone() for n, p in run.network.named_parameters() if "_judge." in n]
    before = judges()
    for _ in range(3): run.one_step()
    assert all(torch.equal(a, b) for a, b in zip(before, judges())) and run.network.held is None
    run.one_step()
    assert not any(torch.equal(a, b) for a, b in zip(before, judges())) and run.network.held is None


def five_steps(c):
    nn.modules.batchnorm._BatchNorm.train = lambda self, mode=True: nn.Module.train(self, False)   # on GPUs they are in step
    run = T.Run(c, "unused")
    for _ in range(5): run.one_step()
    return run.network.state_dict(), run.read()


@pytest.mark.parametrize("name", NAMES)
def test_2_processes_are_one(tiny, tmp_path, name):
    "Losses and gradients of every turn; Adam's first steps have the gradient's sign only, so its weights are held to a rate."
    c = tiny(name, optimiser="sgd", lr=0.01, gan_lr=1e-6)
    (one, rows), (two, others) = (by_processes(world, tmp_path, five_steps, c) for world in (1, 2))
    for key in one: torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=2e-5, msg=lambda m: f"{key}: {m}")
    for a, b in zip(rows, others):
        assert a.keys() == b.keys()
        for k in a: assert a[k] == pytest.approx(b[k], rel=2e-3, abs=1e-4, nan_ok=True), (a["step"], k)


@pytest.mark.parametrize("change", [dict(accumulate=2), dict(compile=True)])
def test_what_cannot_go_with_several_turns_is_refused(tiny, change):
    with pytest.raises(UserError, match="not with a method of several turns"): T.Run(tiny("tsgan", **change), "unused")


def test_images_that_cannot_be_judged_or_paired_are_refused(tiny, tmp_path):
    assert halvings((128, 128)) == 5 and halvings((96, 48)) == 4 and PatchJudge(2)(torch.zeros(1, 3, 5, 7)).shape[2:] == (3, 4)
    with pytest.raises(UserError, match="4×4 cannot be judged: no patches are left; give sizes of 5 pixels or more"):
        T.train(tiny("aligngan", size=(16, 16), shrink=4), tmp_path / "a", quiet=True)
    with pytest.raises(UserError, match="visible and infrared must be multiples of 2, and equal"):
        T.train(tiny("aligngan", visible=4), tmp_path / "b", quiet=True)
    for name in NAMES:
        with pytest.raises(UserError, match="width = 0: expected a whole number, 1 or more"): tiny(name, width=0)


def test_a_nan_names_turn_and_term(tiny, tmp_path, monkeypatch):
    real = tsgan.TSGANMethod.losses
    def losses(self, rows, batch, net=None, turn="main"):
        terms = real(self, rows, batch, net, turn)
        return dict(terms, cycle=terms["cycle"] * math.nan) if turn == "generator" and batch.when.step == 1 else terms
    monkeypatch.setattr(tsgan.TSGANMethod, "losses", losses)
    with pytest.raises(T.NonFinite, match="step 1: generator.cycle is not finite"): T.train(tiny("tsgan"), tmp_path / "run", quiet=True)


def peak_of_a_step(c, *places):
    "Most memory that this process ever had, bytes, after a step at each place of a run."
    run = T.Run(c, "unused")
    for place in places:
        run.step = int(place * run.total)
        run.one_step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name, places", [("aligngan", [0.9])])    # the dearest; the others take a minute each
def test_a_step_of_published_width_at_128x128_fits_24_gb(name, places, root, tmp_path, record_property):
    """Float32, the dearest phases: new processes do a step of a small batch and of one twice as large. Weights, gradients and
    moments are in both, so the difference is what so many images need; memory grows by it to the published batch."""
    full = config(name)
    each, batches = full.settings["every"], (2, 4)                            # images of each modality, of so many identities
    peaks = [by_processes(1, tmp_path, peak_of_a_step, config(name, root=root, size=(128, 128), shrink=1, weights=None, ids=ids, visible=each,
                                                              infrared=each, device="cpu", precision="fp32"), *places) for ids in batches]
    (few, more), wanted = (2 * ids * each for ids in batches), full.ids * (full.visible + full.infrared)
    expected = peaks[0] + (peaks[1] - peaks[0]) * (wanted - few) / (more - few)
    record_property("peaks", [*peaks, expected])
    print(f"{name}: {few} images {peaks[0] / 1e9:.2f} GB, {more} images {peaks[1] / 1e9:.2f} GB, {wanted} images about {expected / 1e9:.1f} GB")
    assert peaks[0] < peaks[1] and expected < 24e9
