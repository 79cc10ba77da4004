"What every row of Table 1 has to pass, parametrised over `METHODS`."
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from di2l import train as T
from di2l.console import UserError, field_types
from di2l.data.records import IdentitySampler
from di2l.methods import recipes     # which adds its methods
from di2l.methods.method import Batch, When, group_slices
from di2l.methods.rows import METHODS, PUBLISHED, SOURCES, TABLE1
from di2l.runs.config import config
from di2l.runs.draws import named_draws
from di2l.runs.process import fix_arithmetic
from di2l.synthetic.benchmark import write_benchmark
from processes import by_processes

MODERN = ("zero-padding-modern", "ddag-modern")     # of `recipes`: one with a network of its own, one without
OTHERS = ("di2l.methods.controls", "di2l.methods.recipes")
ROWS = [*(name for name, method in METHODS.items() if method.__module__ not in OTHERS and name != "base"), *MODERN]
SMALL = dict(size=(96, 48), ids=4, visible=2, infrared=2, steps=5, save_every=2, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def root(tmp_path_factory): return str(write_benchmark(tmp_path_factory.mktemp("rows") / "tiny", preset="tiny"))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    fix_arithmetic()


def small(name, root, **changes): return config("quick", **{**SMALL, "method": name, "root": root, **changes})


def still(run):
    "Batch normalisation by its running statistics: a processor has no exchange of the batch's own."
    for m in run.network.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    return run


@pytest.mark.parametrize("name", ROWS)
def test_resumed_after_every_step_it_ends_with_the_same_bytes(name, root, tmp_path):
    "Every phase and turn, and what the method remembers: a new object after each step knows only the checkpoint."
    c = small(name, root, save_every=5)
    T.train(c, tmp_path / "whole", quiet=True)
    folder = tmp_path / "parts"
    folder.mkdir()
    for step in range(5):
        run = T.Run(c, folder)
        run.log = T.Log(folder, run.load() or 0)
        assert run.step == step
        run.one_step()
        run.log.write(run.read())
        run.save()
    T.train(c, folder, resume=True, quiet=True)
    for file in "model.safetensors", "log.csv": assert (tmp_path / "whole" / file).read_bytes() == (folder / file).read_bytes(), file


def two_steps(c):
    "State and scalars of a run after two steps, batch normalisation held still."
    run = still(T.Run(c, "unused"))
    for _ in range(2): run.one_step()
    return dict(run.network.state_dict()), run.read()


def two_steps_of_all(configs):
    fix_arithmetic()
    return {name: two_steps(c) for name, c in configs.items()}


@pytest.fixture(scope="module")
def by_two(root, tmp_path_factory):
    configs = {name: small(name, root, optimiser="sgd", lr=1e-2, head_lr=1.0, warmup=0.0) for name in ROWS}
    return configs, by_processes(2, tmp_path_factory.mktemp("two"), two_steps_of_all, configs)


@pytest.mark.parametrize("name", ROWS)
def test_2_processes_are_one(name, by_two):
    configs, found = by_two
    (one, rows), (two, others) = two_steps(configs[name]), found[name]
    if len(T.METHODS[name](**configs[name].settings).players(T.METHODS[name](**configs[name].settings).network(4))) > 1:
        # Adam's first steps are the gradient's sign, so rounding decides weights whose gradient is 0: losses are compared instead
        for key, value in rows[0].items(): assert value == pytest.approx(others[0][key], rel=1e-4, abs=1e-6, nan_ok=True), key
        return
    for key in one: torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6, msg=lambda m: f"{key}: {m}")
    assert rows[0]["step"] == 0 and rows[0].keys() == others[0].keys()


@pytest.mark.parametrize("name", ROWS)
def test_no_trainable_parameter_is_idle_and_a_turn_moves_its_player_only(name, root):
    "Over a run's turns, with weight decay off: whatever may learn does, and nothing that is another's."
    run = T.Run(small(name, root, weight_decay=0.0, steps=24), "unused")
    trainable = {n: p for n, p in run.network.named_parameters() if p.requires_grad}
    players, moved, turns = run.method.players(run.network), set(), set()
    for step in range(24):                                             # past the first epoch
        due = run.method.turns(run.when)
        turns |= {*due}
        before = {n: p.detach().clone() for n, p in trainable.items()}
        run.one_step()
        now = {n for n, p in trainable.items() if not torch.equal(p, before[n])}
        mine = [players[turn] for turn in due]
        assert all(any(children is None or n.split(".")[0] in children for children in mine) for n in now)
        moved |= now
    assert turns == {*players} and {*trainable} - moved == set()


@pytest.mark.parametrize("name", ROWS)
def test_evaluation_is_deterministic_and_knows_no_batch_mates(name, root):
    run = T.Run(small(name, root), "unused")
    for _ in range(3): run.one_step()
    net, images = run.network.eval(), torch.randn(5, 3, 96, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for modality in "visible", "infrared":
            together, again = (net(**{modality: images}) for _ in range(2))
            assert torch.equal(together, again) and together.ndim == 2 and together.isfinite().all()
            alone = torch.cat([net(**{modality: one[None]}) for one in images])
            torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_settings_that_cannot_be_meant_are_refused(name, root):
    "NaN and -1 for every number (NFS's gates may start closed); an unknown setting suggests the nearest."
    method = METHODS[name]
    kinds = field_types(method)
    numbers = [f.name for f in fields(method) if isinstance(f.default, (int, float)) and not isinstance(f.default, bool)]
    for setting in numbers:
        bad = (float("nan"),) if setting == "start" else (float("nan"), -1.0) if isinstance(getattr(method(weights=None), setting), float) else (-1,)
        for value in bad:
            with pytest.raises(UserError, match=setting): method(**{setting: value})
    assert kinds.keys() >= {*numbers}
    with pytest.raises(UserError, match="did you mean"): small(name, root, weigths="imagenet")


@pytest.mark.parametrize("name", ROWS)
def test_a_batch_that_a_loss_cannot_use_is_an_error_that_says_why(name, root):
    "One identity only: no negative, or nothing to tell apart. A method whose losses need no other identity may go on."
    run = T.Run(small(name, root), "unused")
    views, pids = run.batches(0, 0)
    turn = run.method.turns(When())[0]
    rows = run.net(**views) if len(run.optimisers) == 1 else run.net(turn=turn, **views)
    one = Batch(torch.zeros_like(pids), run.batches.of, When(), named_draws(0))
    try: terms = run.method.losses(rows, one, run.network, turn)
    except ValueError as e: assert len(str(e)) > 20 and any(word in str(e) for word in ("identit", "negative", "positive"))
    else: assert all(value.isfinite() for value in terms.values())


def test_groups_and_columns_are_what_they_say(root):
    for name, method in METHODS.items():
        m = method(weights=None) if "weights" in field_types(method) else method()
        for modality, times in m.groups.values(): assert modality in ("visible", "infrared") and times >= 1, name
        assert group_slices(m.groups, dict(visible=4, infrared=4))
        if len(m.turns(When())) > 1: assert m.columns, name


@pytest.mark.parametrize("name", TABLE1)
def test_published_settings_are_a_preset_with_a_source(name):
    "For both datasets; whatever a preset changes is named in its source (the base's epochs aside) and is a change."
    for dataset in "sysu", "regdb":
        c = config(name, dataset=dataset)
        known = {**vars(c), **c.settings}
        assert c.method == name and {k: known[k] for k in PUBLISHED[name]} == PUBLISHED[name]
    defaults = {**vars(config(method=name)), **config(method=name).settings}
    assert all(defaults[k] != value for k, value in PUBLISHED[name].items())
    assert all(k in SOURCES[name] for k in PUBLISHED[name] if k != "epochs") and len(SOURCES[name]) > 40
    assert PUBLISHED.keys() == SOURCES.keys() == {*TABLE1}


def test_aligngans_rate_falls_after_5_000_joint_steps():
    "Its milestones are epochs, whose length is the sampler's: 395 identities of SYSU-MM01 with 22,258 visible images, 206 of RegDB."
    c = config("aligngan")
    for people, visible, infrared, milestone in ((395, 22_258, 11_909, *c.milestones), (206, 2_060, 2_060, 194)):
        assert str(milestone) in (SOURCES["aligngan"] + str(c.milestones))
        counts = dict(visible=visible, infrared=infrared)
        rows = [dict(pid=k % people, modality=m, cam=1) for m, n in counts.items() for k in range(n)]
        per_epoch = len(IdentitySampler(pd.DataFrame(rows), c.ids, c.visible, c.infrared))
        assert abs(milestone * per_epoch - 20_000) <= per_epoch / 2
