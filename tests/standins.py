"""Stand-ins: a dataset's layout, names and counts, with flat-coloured images that take a tenth of a
millisecond to make.

The licences of the three datasets let nobody ship an image. A stand-in proves that readers, caches and
protocols hold at full size, and is worthless as data. Its counts come from
- SYSU-MM01: the authors' `rand_perm_cam.mat` (with `test_id.mat` and `train_id.mat` beside it), which gives
  away the number of images of each identity by each camera. Without that file the totals of each camera and
  split are right, and spread evenly over the identities;
- RegDB: 412 x (10 + 10), ten random halvings;
- LLCM: the totals that its publication prints, spread evenly over identities and cameras, since it prints
  no more."""
import io
import json
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from di2l.console import UserError, one_of, progress
from di2l.data.records import FOLDERS, MODALITIES, SYSU_CAMERAS, read_dataset

SYSU_TOTALS = {  # split: (identities, {camera: (images, identities seen)}), as in the official permutations
    "test": (96, {1: (1374, 56), 2: (1565, 56), 3: (1883, 93), 4: (1918, 94), 5: (1918, 95), 6: (1920, 96)}),
    "train": (296, {1: (4721, 194), 2: (5753, 195), 3: (5929, 293), 4: (4821, 283), 5: (4989, 294),
                    6: (4000, 200)}),
    "val": (99, {3: (1980, 99), 4: (990, 99), 5: (984, 96)}),
    None: (22, {1: (194, 9), 2: (210, 8), 3: (20, 1), 4: (301, 17), 5: (333, 17), 6: (60, 3)})}  # in no split
ALONE = ["45"] * 10 + ["145"] + ["1245"] * 6 + ["12"] * 2 + ["36"] + ["6"] * 2  # cameras of those 22
LLCM_TOTALS = {"train": (713, 16946, 13975), "test": (351, 8680, 7166)}  # identities, images of each modality
BASES = {"sysu": dict(every=48, size=(32, 16)), "regdb": dict(every=40, size=(32, 16)),
         "llcm": dict(every=150, size=(32, 16))}  # small ones, for tests
VARIANTS = 4  # different images of an identity in a modality; the frames after them repeat their pixels


def evenly(total, n):
    "`total` in `n` parts that differ by one at most."
    return [total // n + (i < total % n) for i in range(n)]


def counts_by_totals():
    """{(camera, identity): images}, {split: identities}, from `SYSU_TOTALS`.

    Cameras 1, 2 and 6 see the first identities of a split, 3, 4 and 5 the last."""
    counts, splits, first = {}, {}, 1
    for split, (n, cams) in SYSU_TOTALS.items():
        pids = list(range(first, first + n))
        first += n
        if split: splits[split] = pids
        for cam, (images, seen) in cams.items():
            visited = pids[:seen] if cam in (1, 2, 6) else pids[n - seen:]
            if split is None: visited = [p for p, cs in zip(pids, ALONE) if str(cam) in cs]
            counts.update({(cam, p): c for p, c in zip(visited, evenly(images, len(visited)))})
    return counts, splits


def sysu_counts(permutations=None):
    """How many images of whom SYSU-MM01 has: {(camera, identity): images}, {split: identities}.

    `permutations`: official `rand_perm_cam.mat`, beside it `test_id.mat`, `train_id.mat`; None: even."""
    if permutations is None: return counts_by_totals()
    from scipy.io import loadmat
    table, beside = loadmat(permutations)["rand_perm_cam"], Path(permutations).parent
    counts = {(c, p): o.shape[1] for c, (cam,) in enumerate(table, 1)
              for p, (o,) in enumerate(cam, 1) if o.shape[1]}
    splits = {s: sorted(map(int, loadmat(str(beside / f"{s}_id.mat"))["id"].ravel())) for s in ("train", "test")}
    seen = {m: {p for c, p in counts if SYSU_CAMERAS[c] == m} for m in MODALITIES}
    splits["val"] = sorted((seen["visible"] & seen["infrared"]) - set(splits["train"]) - set(splits["test"]))
    return counts, splits


def figure(pid, modality, variant, size):
    "Head, trunk and legs in the identity's colours on noise."
    rng, (H, W) = np.random.default_rng((pid, modality == "visible", variant)), size
    colours = np.random.default_rng((pid, modality == "visible")).integers(40, 216, (3, 3))
    image = rng.integers(85, 136, (H, W, 1)).repeat(3, 2)                                           # (H,W,3)
    body = colours.repeat([H // 5, 2 * (H // 5), H - 3 * (H // 5)], axis=0)[:, None]                # (H,1,3)
    left = W // 5 + int(rng.integers(W // 6 + 1))
    image[:, left:left + W // 2] += body - 110
    if modality == "infrared": image = image.mean(2, keepdims=True).repeat(3, 2)
    return Image.fromarray((image + rng.integers(-12, 13)).clip(0, 255).astype(np.uint8))


def unique(data, number):
    "The same pixels with other bytes: a comment after a JPEG's first marker, a tail after a BMP's last row."
    mark = number.to_bytes(4, "big")
    return data[:2] + b"\xff\xfe\x00\x06" + mark + data[2:] if data[:2] == b"\xff\xd8" else data + mark


def encode(image, ending):
    stream = io.BytesIO()
    image.save(stream, {"jpg": "JPEG", "bmp": "BMP"}[ending])
    return stream.getvalue()


def sysu_plan(permutations, every):
    "[(path, identity, camera, modality, frame)], {split file: text}"
    counts, splits = sysu_counts(permutations)
    alone = sorted({p for _, p in counts} - {p for v in splits.values() for p in v})
    keep = {p for pids in [*splits.values(), alone] for p in pids[::every]}
    files = [(f"cam{c}/{p:04d}/{i:04d}.jpg", p, c, SYSU_CAMERAS[c], i)
             for (c, p), n in counts.items() if p in keep for i in range(1, n + 1)]
    texts = {f"exp/{s}_id.txt": ",".join(str(p) for p in pids if p in keep) for s, pids in splits.items()}
    return files, texts


def regdb_plan(every):
    "As `sysu_plan`."
    pids, texts, kinds = list(range(1, 413, every)), {}, {"visible": "visible", "thermal": "infrared"}
    names = {(kind, p): [f"{kind.title()}/{p}/person_{kind[0]}_{20 * p + i:05d}_{p}.bmp" for i in range(10)]
             for kind in kinds for p in pids}
    for trial in range(1, 11):
        order = np.random.default_rng((412, trial)).permutation(pids)
        for split, half in zip(("train", "test"), np.array_split(order, 2)):
            for kind in kinds:
                lines = [f"{f} {k}" for k, p in enumerate(half) for f in names[kind, int(p)]]
                texts[f"idx/{split}_{kind}_{trial}.txt"] = "\n".join(lines)
    files = [(f, p, 1 + (kind == "thermal"), kinds[kind], i)
             for (kind, p), fs in names.items() for i, f in enumerate(fs)]
    return files, texts


def llcm_plan(every):
    "As `sysu_plan`."
    files, lists, test, first = [], {"vis": [], "nir": []}, [], 1
    for split, (n, *images) in LLCM_TOTALS.items():
        for kind, total in zip(lists, images):
            cams = [c for c in range(1, 10) if (split, kind, c) != ("test", "nir", 3)]  # none is read there
            for k, m in list(enumerate(evenly(total, n)))[::every]:
                for i in range(m):
                    p, c = first + k, cams[(k + i) % len(cams)]
                    name = f"{p:04d}/{p:04d}_c{c:02d}_s{100000 + i:06d}_f{i:04d}_{kind}.jpg"
                    path = f"{kind}/{name}" if split == "train" else f"test_{kind}/cam{c}/{name}"
                    files.append((path, p, c, "visible" if kind == "vis" else "infrared", i))
                    if split == "train": lists[kind].append(f"{path} {k}")
        if split == "test": test = list(range(first, first + n))[::every]
        first += n
    texts = {f"idx/train_{kind}.txt": "\n".join(v) for kind, v in lists.items()}
    return files, {**texts, "idx/test_id.txt": ",".join(map(str, test))}


def write_standin(name, out, permutations=None, size=(96, 40), every=1):
    """Write a stand-in of "sysu", "regdb" or "llcm" into the new or empty folder `out`; returns its path.

    `permutations`: official `rand_perm_cam.mat`, for SYSU-MM01's real counts; `size`: (H, W) of the images;
    `every`: keep each n-th identity only, for quick tests."""
    out = Path(out)
    if out.exists() and any(out.iterdir()): raise UserError(f"{out}: is not empty; give a new folder")
    one_of(FOLDERS, dataset=name)
    plans = {"sysu": lambda: sysu_plan(permutations, every), "regdb": lambda: regdb_plan(every),
             "llcm": lambda: llcm_plan(every)}
    files, texts = plans[name]()
    folders = {f.rpartition("/")[0] for f in [*texts, *(f[0] for f in files)]}
    for folder in folders: (out / folder).mkdir(parents=True, exist_ok=True)
    for text, content in texts.items(): (out / text).write_text(content + "\n")
    encoded = lru_cache(4096)(lambda pid, modality, variant, ending:
                              encode(figure(pid, modality, variant, size), ending))
    bar = progress(files, desc=f"stand-in for {name}", unit="image")
    for i, (path, pid, cam, modality, frame) in enumerate(bar):
        (out / path).write_bytes(unique(encoded(pid, modality, frame % VARIANTS, path[-3:]), i))
    counts = "of the official permutations" if permutations else "published totals, spread evenly"
    about = dict(standin_for=name, counts=counts, every=every, images=len(files))
    (out / "standin.json").write_text(json.dumps(about, indent=1) + "\n")
    return out


def read(name, root):
    "A dataset, without warnings of what a stand-in lacks."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_dataset(name, root)


def first(root, name="sysu"):
    "The first image."
    return root / read(name, root).records.path.iloc[0]


def cut(root):
    "Truncate the first image."
    f = first(root)
    f.write_bytes(f.read_bytes()[:-60])
    return f
