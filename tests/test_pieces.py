"The paper's pieces against float64 oracles written from the equations, against independent implementations, and at their edges."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from di2l.console import UserError
from di2l.dpa import DPA, READINGS, stripe_pool
from di2l.focal import FocalLoss
from di2l.methods.method import Batch
from di2l.model import DI2L, METHODS, AGWMethod, CAJMethod, DI2LMethod
from di2l.non_local import GAUGES, NonLocal, attention_gauges
from di2l.rca import IMAGENET_MEAN, IMAGENET_STD, augment, channel_augment, normalise
from di2l.runs.draws import named_draws
from di2l.runs.log import DEAD, dead_attention
from di2l.trunk import build_trunk
from di2l.wrt import WRTLoss

seeds = st.integers(0, 2**31)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def pixels(B, H, W, seed):
    return torch.randint(256, (B, 3, H, W), dtype=torch.uint8, generator=generator(seed))


# ---------------------------------------------------------------- Eq. 1 and what follows it


@given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(1, 7))
def test_rca_copies_one_channel_of_the_same_image(seed, B, H, W):
    x = pixels(B, H, W, seed)
    y = channel_augment(x, generator=generator(seed))
    assert y.shape == x.shape and y.dtype == x.dtype
    for before, after in zip(x, y):
        assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
        assert any(torch.equal(after[0], channel) for channel in before)


def test_rca_draws_uniformly_and_for_each_image():
    x = torch.arange(3, dtype=torch.uint8).view(1, 3, 1, 1).expand(30_000, 3, 1, 1)
    counts = torch.bincount(channel_augment(x, generator=generator(0))[:, 0, 0, 0].long(), minlength=3)
    assert (counts - 10_000).abs().max() < 4 * math.sqrt(30_000 * 2 / 9)


def naive_augment(x, seed, flip, crop, erase, pad):
    "The same draws, applied to one image and one pixel at a time, then normalised; float64."
    B, _, H, W = x.shape
    g = generator(seed)
    flips = torch.rand(B, generator=g) < flip
    shift = torch.randint(-pad, pad + 1, (2, B, 1), generator=g)[..., 0]
    crops = torch.rand(B, generator=g) < crop
    erases, draw = torch.rand(B, generator=g) < erase, torch.rand(4, B, generator=g)
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    out = np.empty((B, 3, H, W))
    for i in range(B):
        image = x[i].numpy() / 255.0
        if flips[i]:
            image = image[:, :, ::-1]
        dy, dx = (int(v) if crops[i] else 0 for v in shift[:, i])
        rows = [min(max(r + dy, 0), H - 1) for r in range(H)]
        columns = [min(max(k + dx, 0), W - 1) for k in range(W)]
        image = image[:, rows][:, :, columns].copy()
        if erases[i]:
            share, ratio = 0.02 + 0.38 * draw[0, i], 0.3 * (3.3 / 0.3) ** draw[1, i]
            h = int(min(max(torch.round(torch.sqrt(share * H * W * ratio)), 1), H))
            w = int(min(max(torch.round(torch.sqrt(share * H * W / ratio)), 1), W))
            top, left = int(draw[2, i] * (H - h + 1)), int(draw[3, i] * (W - w + 1))
            image[:, top : top + h, left : left + w] = mean
        out[i] = (image - mean) / std
    return out


probabilities = st.sampled_from([0.0, 0.5, 1.0])


@settings(max_examples=80)
@given(seeds, st.integers(2, 5), st.integers(2, 40), st.integers(2, 20), st.integers(0, 25), *[probabilities] * 3, st.booleans())
def test_augmentation_equals_a_loop_over_images(seed, B, H, W, pad, flip, crop, erase, last):
    "Channels last in memory or first; into fresh memory or into an earlier batch's."
    x = pixels(B, H, W, seed)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = naive_augment(x, seed, flip, crop, erase, pad)
    fresh = augment(x, generator(seed), flip, crop, erase, pad)
    again = augment(x, generator(seed), flip, crop, erase, pad, out=torch.full_like(fresh, float("nan")))
    assert torch.equal(fresh, again)
    np.testing.assert_allclose(fresh.numpy(), expected, atol=2e-6)
    assert fresh.dtype == torch.float32 and fresh.is_contiguous(memory_format=torch.channels_last)


def test_erased_pixels_are_exactly_zero():
    x = torch.full((64, 3, 20, 10), 230, dtype=torch.uint8)
    erased = (augment(x, generator(0), flip=0.0, crop=0.0, erase=1.0) == 0).all(1)
    assert erased.flatten(1).any(1).all() and not erased.flatten(1).all(1).any()
    assert torch.equal(normalise(torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1))


def test_normalise_is_torchvisions():
    from torchvision.transforms.functional import normalize

    x = torch.rand(4, 3, 5, 6, generator=generator(0))
    assert torch.allclose(normalise(x), normalize(x, IMAGENET_MEAN, IMAGENET_STD))


@pytest.mark.parametrize("step", ["flip", "crop", "erase"])
def test_each_image_draws_its_own(step):
    x, off = pixels(1, 24, 12, 0).expand(200, -1, -1, -1), dict(flip=0.0, crop=0.0, erase=0.0)
    changed = augment(x, generator(1), **{**off, step: 0.5}) != augment(x, **off)
    assert 0.35 < changed.flatten(1).any(1).float().mean() < 0.6


def test_no_step_without_its_probability():
    "All off is normalising alone; a flip that always comes is a mirror."
    x, off = pixels(8, 24, 12, 0), dict(flip=0.0, crop=0.0, erase=0.0)
    assert torch.allclose(augment(x, generator(1), **off), normalise(x / 255.0), atol=2e-6)
    assert torch.equal(augment(x, generator(1), **{**off, "flip": 1.0}), augment(x, generator(1), **off).flip(3))


# ---------------------------------------------------------------- Eq. 2–3


@settings(max_examples=30)
@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 3))
def test_non_local_equals_the_equation_in_float64(seed, C, H, W, scale):
    torch.manual_seed(seed)
    block, x = NonLocal(C), scale * torch.randn(2, C, H, W)
    torch.nn.init.normal_(block.z.weight)
    u, v, g, z = (m.weight[:, :, 0, 0].detach().double().numpy() for m in (block.u, block.v, block.g, block.z))
    for image, ours in zip(x, block(x).detach()):
        f = image.flatten(1).double().numpy()
        e = (u @ f).T @ (v @ f)                                        # (i, j)
        w = np.exp(e - e.max(1, keepdims=True))
        expected = z @ (g @ f) @ (w / w.sum(1, keepdims=True)).T + f
        np.testing.assert_allclose(ours.flatten(1).numpy(), expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- Eq. 4


@settings(max_examples=30)
@given(seeds, st.sampled_from(READINGS), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1.0, 3.0]))
def test_dpa_equals_its_reading_in_float64(seed, reading, P, q):
    torch.manual_seed(seed)
    dpa, x = DPA(5, P, reading, q=q).eval(), torch.rand(3, 5, 6, 4)
    scale = None
    if hasattr(dpa, "bn"):
        torch.nn.init.normal_(dpa.bn.weight)
        scale = dpa.bn.weight.detach().double().numpy() / math.sqrt(1 + dpa.bn.eps)      # fresh running statistics: mean 0, variance 1
    u, v, z = (m.weight[:, :, 0].detach().double().numpy() for m in (dpa.u, dpa.v, dpa.z))
    for image, ours in zip(x.double().numpy(), dpa(x).detach().numpy()):
        pool = lambda a: (np.maximum(a, 1e-6) ** q).mean((1, 2)) ** (1 / q)
        parts = [pool(s) for s in np.split(image, P, axis=1)]
        alpha = np.array([[math.exp((u @ a) @ (v @ b)) for b in parts] for a in parts])
        alpha /= alpha.sum(1, keepdims=True)
        mixed = [sum(alpha[i, j] * (z @ parts[j]) for j in range(P)) for i in range(P)]
        expected = {
            "diagonal": lambda: np.mean([alpha[i, i] * (z @ parts[i]) for i in range(P)], 0),
            "weighted-sum": lambda: np.mean(mixed, 0),
            "part-residual": lambda: np.mean([parts[i] + scale * mixed[i] for i in range(P)], 0),
            "pooled-residual": lambda: pool(image) + scale * np.mean(mixed, 0),
        }[reading]()
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 20))
def test_parts_have_to_divide_the_map(H, P):
    x = torch.rand(1, 2, H, 3)
    if H % P:
        with pytest.raises(UserError, match="take parts from"):
            stripe_pool(x, P)
    else:
        assert stripe_pool(x, P, 1.0).mean() == pytest.approx(x.mean().item(), rel=1e-4)


# ---------------------------------------------------------------- Eq. 5


@settings(max_examples=60)
@given(seeds, st.integers(1, 20), st.integers(2, 15), st.floats(0, 6), st.floats(0.01, 10))
def test_focal_equals_the_equation(seed, N, K, gamma, scale):
    torch.manual_seed(seed)
    logits, pids = scale * torch.randn(N, K, dtype=torch.float64), torch.randint(K, (N,))
    p = logits.softmax(1)[torch.arange(N), pids].clamp(1e-300)
    assert FocalLoss(gamma)(logits, pids).item() == pytest.approx((-(1 - p) ** gamma * p.log()).mean().item(), rel=1e-7, abs=1e-12)


@settings(max_examples=60)
@given(seeds, st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]), st.floats(1, 1e4))
def test_focal_is_finite_and_falls_along_its_gradient(seed, gamma, scale):
    torch.manual_seed(seed)
    logits = (scale * (2 * torch.rand(6, 4) - 1)).requires_grad_()
    pids = torch.randint(4, (6,))
    loss = FocalLoss(gamma)(logits, pids)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and logits.grad.isfinite().all()
    if logits.grad.norm() > 1e-3:
        assert FocalLoss(gamma)(logits.detach() - 1e-2 * logits.grad / logits.grad.norm(), pids) <= loss + 1e-6 * loss.abs()


def test_focal_under_autocast_is_float32():
    logits, pids = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert FocalLoss()(logits, pids).dtype == torch.float32


# ---------------------------------------------------------------- Eq. 6


def triple_loop(features, pids, squared):
    total = 0.0
    for i, a in enumerate(features):
        d = [math.dist(a, b) for b in features]
        P = [d[j] for j in range(len(d)) if pids[j] == pids[i] and j != i]
        N = [d[k] for k in range(len(d)) if pids[k] != pids[i]]
        wp, wn = [math.exp(x - max(P)) for x in P], [math.exp(min(N) - x) for x in N]
        x = sum(w * d for w, d in zip(wp, P)) / sum(wp) - sum(w * d for w, d in zip(wn, N)) / sum(wn)
        y = math.copysign(x * x, x) if squared else x
        total += max(y, 0) + math.log1p(math.exp(-abs(y)))
    return total / len(features)


@settings(max_examples=80)
@given(seeds, st.integers(2, 4), st.integers(2, 4), st.booleans(), st.floats(-4, 4))
def test_wrt_equals_a_triple_loop(seed, identities, images, squared, exponent):
    torch.manual_seed(seed)
    pids = torch.arange(identities).repeat_interleave(images)[torch.randperm(identities * images)]
    features = 10**exponent * torch.randn(len(pids), 5, dtype=torch.float64)
    assert WRTLoss(squared)(features, pids).item() == pytest.approx(triple_loop(features.tolist(), pids.tolist(), squared), rel=1e-9)


@settings(max_examples=60)
@given(seeds, st.floats(-30, 4), st.booleans(), st.booleans())
def test_wrt_is_finite_and_never_dead(seed, exponent, squared, coincide):
    torch.manual_seed(seed)
    features, pids = 10**exponent * torch.randn(8, 6), torch.arange(4).repeat(2)
    if coincide:
        features[4:] = features[:4].roll(1, 0)                            # the positive sits on a stranger
    features.requires_grad_()
    loss = WRTLoss(squared)(features, pids)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()
    if loss > 1:
        assert features.grad.norm() > 0.01


def test_wrt_gradient_is_right():
    torch.manual_seed(0)
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: WRTLoss()(f, torch.tensor([0, 0, 1, 1, 2, 2])), features)


@pytest.mark.parametrize("pids, words", [([0, 0, 0, 0], "none has a negative"), ([0, 0, 1, 2], r"identities \[1, 2\] have a single image")])
def test_wrt_names_lonely_anchors(pids, words):
    with pytest.raises(ValueError, match=words):
        WRTLoss()(torch.randn(4, 3), torch.tensor(pids))


# ---------------------------------------------------------------- Fig. 1


def test_trunk_is_torchvisions_with_the_last_stride_taken_out():
    import torchvision

    for name in ("resnet18", "resnet50"):
        torch.manual_seed(0)
        ours, theirs = build_trunk(name).eval(), getattr(torchvision.models, name)(weights=None).eval()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(1, 3, 64, 32)
        stem = lambda t: t.maxpool(t.relu(t.bn1(t.conv1(x))))
        upto3 = lambda t: t.layer3(t.layer2(t.layer1(stem(t))))
        assert torch.equal(upto3(ours), upto3(theirs))
        assert ours.layer4(upto3(ours)).shape[2:] == (4, 2) and theirs.layer4(upto3(theirs)).shape[2:] == (2, 1)


def test_network_is_the_composition_of_its_parts():
    "Fig. 1 put together by hand from the modules, in the order that the paper gives."
    torch.manual_seed(0)
    net = DI2L(5, backbone="resnet10").eval()
    for block in (net.non_local2, net.non_local3):
        torch.nn.init.normal_(block.z.weight, std=0.1)
    visible, infrared = torch.randn(2, 3, 96, 48), torch.randn(3, 3, 96, 48)
    x = torch.cat([net.visible_stem(visible), net.infrared_stem(infrared)])
    for module in (net.stage1, net.stage2, net.non_local2, net.stage3, net.non_local3, net.stage4, net.dpa, net.bn_neck):
        x = module(x)
    with torch.no_grad():
        assert torch.allclose(net(visible=visible, infrared=infrared), x / x.norm(dim=1, keepdim=True), atol=1e-6)


def test_one_trunk_two_stems():
    "ResNet-50: one trunk, where public code builds three and leaves two thirds of the parameters idle."
    net = DI2L(395, dpa=False, non_local=False)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == 23_508_032 + 9_536 + 2 * 2048 + 395 * 2048      # torchvision's ResNet-50 without fc, a second stem, neck, classifier


@pytest.mark.parametrize("name", ["di2l", "caj", "agw"])
def test_no_parameter_is_idle(name):
    torch.manual_seed(0)
    method = METHODS[name](backbone="resnet10", weights=None)
    net, pids = method.network(4), torch.arange(4).repeat_interleave(2)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(2):
        rows = net(**method.augment(pixels(8, 96, 48, step), pixels(8, 96, 48, step + 9), named_draws(step)))
        views = sum(times for _, times in method.groups.values())
        assert len(rows["features"]) == 8 * views
        optimiser.zero_grad()
        sum(method.losses(rows, Batch(pids.repeat(views))).values()).backward()
        optimiser.step()
    assert [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


def test_baselines_are_di2l_with_switches_thrown():
    assert CAJMethod() == CAJMethod(dpa=False, gamma=0.0) and not CAJMethod().dpa
    assert (AGWMethod().rca, AGWMethod().squared, AGWMethod().groups["visible"]) == (False, False, ("visible", 1))
    assert (DI2LMethod().groups["visible"], DI2LMethod().gamma, DI2LMethod().squared) == (("visible", 2), 2.0, True)


def test_losses_are_those_of_the_pieces():
    torch.manual_seed(0)
    features, logits, pids = torch.randn(6, 4), torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    rows, batch = dict(features=features, logits=logits), Batch(pids)
    terms = DI2LMethod(wrt_scale=4.0).losses(rows, batch)
    assert terms["focal"] == FocalLoss(2.0)(logits, pids)
    assert terms["wrt"] == WRTLoss()(4 * F.normalize(features), pids)
    assert DI2LMethod().losses(rows, batch)["wrt"] == WRTLoss()(features, pids)


def test_pretrained_weights_that_cannot_be_had(monkeypatch):
    import torchvision
    def offline(weights): raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.models, "resnet50", offline)
    with pytest.raises(UserError, match="weights=None"):
        DI2L(5, weights="imagenet")


def test_pretrained_weights_are_used(monkeypatch):
    "What torchvision hands out ends up in the trunk and in both stems."
    import torchvision

    given_weights = torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: given_weights if weights == "IMAGENET1K_V1" else pytest.fail("no weights asked for"))
    net = DI2L(5, backbone="resnet18", weights="imagenet")
    assert torch.equal(net.visible_stem[0].weight, given_weights.conv1.weight) and torch.equal(net.infrared_stem[0].weight, given_weights.conv1.weight)
    assert torch.equal(net.stage3[0].conv1.weight, given_weights.layer3[0].conv1.weight)


def test_names_that_do_not_exist():
    with pytest.raises(UserError, match="resnet50"):
        DI2L(5, backbone="vgg")
    with pytest.raises(UserError, match="did you mean 'diagonal'"):
        DPA(8, reading="diagonale")


# --- attention that lives, and attention that does not

def trained_attention(target, form="printed", steps=300):
    "Gauges of a block trained to bring every position what the first one holds, or the mean of all."
    torch.manual_seed(0)
    block = NonLocal(12, form=form)
    optimiser = torch.optim.Adam(block.parameters(), lr=0.03)
    for step in range(steps):
        content, where = torch.randn(16, 6, 6, 1), torch.eye(6)[None, :, :, None].expand(16, -1, -1, -1)
        x = torch.cat([content, where], 1)                                                # position j knows that it is j
        block.watch = step == steps - 1
        wanted = content[:, :, :1] if target == "first" else content.mean(2, keepdim=True)
        added = (block(x) - x)[:, :6]
        optimiser.zero_grad()
        (added - wanted.expand_as(added)).square().mean().backward()
        optimiser.step()
    return {name: value.item() for name, value in block.gauges.items()}


@pytest.mark.parametrize("form", ["printed", "norm", "unit"])
def test_gauges_tell_an_attention_that_must_saturate_from_one_that_must_not(form):
    dead, even = trained_attention("first", form), trained_attention("mean", form)
    assert dead["perplexity"] < DEAD < 5.9 < even["perplexity"] and dead["spread"] > 10 * even["spread"]
    assert dead_attention([{"step": 3, "a.perplexity": dead["perplexity"], "b.perplexity": even["perplexity"]}]) == {"a": 3}


def naive_gauges(u, v, mixed, added):
    "The gauges by loops, float64."
    entropies, spreads = [], []
    for b in range(len(u)):
        for i in range(u.shape[1]):
            e = [float(u[b, i] @ v[b, j]) for j in range(v.shape[1])]
            z = sum(math.exp(x) for x in e)
            entropies.append(math.exp(-sum(math.exp(x) / z * math.log(math.exp(x) / z) for x in e)))
            spreads.append(np.var(e, ddof=1))
    energy = lambda x: float((x ** 2).sum())
    alphas = [[[math.exp(float(u[b, i] @ v[b, j])) for j in range(v.shape[1])] for i in range(u.shape[1])] for b in range(len(u))]
    alphas = np.array([[np.array(row) / sum(row) for row in image] for image in alphas])
    return (np.mean(entropies), math.sqrt(np.mean(spreads)), alphas.std(0).mean(),
            sum(energy(mixed[b].mean(1)) * mixed.shape[2] for b in range(len(mixed))) / energy(mixed),
            energy(added.mean(0)) * len(added) / energy(added))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), B=st.integers(2, 4), N=st.integers(2, 5))
def test_gauges_are_what_loops_find(seed, B, N):
    u, v, mixed, added = (torch.randn(*shape, generator=generator(seed + k), dtype=torch.float64)
                          for k, shape in enumerate([(B, N, 3), (B, N, 3), (B, 4, N), (B, 4)]))
    found = attention_gauges(u, v, mixed, added)
    assert [*found] == list(GAUGES) and [x.item() for x in found.values()] == pytest.approx(naive_gauges(u, v, mixed, added), rel=1e-9)


@pytest.mark.parametrize("form", ["norm", "unit", "mild", "learned", "centred", "unit+norm", "centred+unit"])
def test_forms_of_attention(form):
    "Each is the identity at first, learns in every parameter, and does what its table says to the exponents."
    torch.manual_seed(1)
    for block, x in ((NonLocal(8, form=form), torch.rand(5, 8, 4, 3)), (DPA(8, form=form), torch.rand(5, 8, 6, 3))):
        u, v = block.matched(x if isinstance(block, NonLocal) else stripe_pool(x, 3))
        exponents = u @ v.mT
        if block.unit: assert exponents.abs().max() <= (most := 2.0 if form == "mild" else 8.0) + 1e-5 and torch.allclose(u.norm(dim=-1), torch.tensor(most))
        if "centred" in form and isinstance(block, NonLocal):
            moved, _ = block.matched(x * torch.rand(8, 1, 1) + 7)                          # a shift and a scale of a channel: gone
            assert torch.allclose(moved, u, atol=1e-2)
        base = x if isinstance(block, NonLocal) else stripe_pool(x, 1)[..., 0]
        assert torch.allclose(block(x), base, atol=1e-6)
        optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (block(torch.rand_like(x)) * torch.randn(base.shape)).sum().backward()
            optimiser.step()
        assert [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(UserError, match="did you mean 'unit'"): NonLocal(8, form="norm+units")


def test_attention_learns_at_a_tenth_of_the_rate():
    from di2l.runs.config import config
    from di2l.train import make_optimiser
    method = DI2LMethod(backbone="resnet10", weights=None, attention_lr=0.1)
    net = method.network(4)
    rates = {id(p): g["rate"] for g in make_optimiser(config("quick", lr=1e-2), method, net).param_groups for p in g["params"]}
    for name, p in net.named_parameters():
        if p.requires_grad: assert rates[id(p)] == pytest.approx(1e-3 if name.startswith(("non_local", "dpa.")) else 1e-2), name
