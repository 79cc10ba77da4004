"Readers, bad input, cache, sampler, stand-ins and the checker."
import json
import re
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

from di2l.console import UserError, progress
from di2l.data import cache as image_cache, records
from di2l.data.cache import ImageCache, cache_images, decode, read_image
from di2l.data.checker import _check_image, verify
from di2l.data.files import read_ids, read_list
from di2l.data.records import SYSU_CAMERAS, IdentitySampler, class_labels, hold_out, read_dataset, read_llcm, read_regdb, read_sysu
from standins import BASES, cut, first, llcm_plan, read, sysu_counts, write_standin


def counts(report):
    "What a report counted: (what, expected, found)."
    return list(report.checks[["what", "expected", "found"]].itertuples(index=False, name=None))


# --- readers

@pytest.mark.parametrize("name", BASES)
def test_records_have_one_row_an_image_and_frames_count_sorted_files(bases, name):
    data = read(name, bases[name])
    r = data.records
    assert list(r.columns) == ["path", "pid", "cam", "modality", "split", "frame"] and r.index.tolist() == list(range(len(r)))
    assert r.path.is_unique and all((bases[name] / p).is_file() for p in r.path)
    assert not set(data.train.pid) & set(data.test.pid) and len(data.train) + len(data.test) == len(r)
    for _, group in r.groupby(["pid", "cam", "modality"]):
        assert group.frame.tolist() == list(range(1, len(group) + 1)) and group.path.tolist() == sorted(group.path)


def test_sysu_merges_train_and_val_by_name_and_knows_its_cameras(bases):
    data = read("sysu", bases["sysu"])
    assert set(data.train.split) == {"train", "val"} and set(data.test.split) == {"test"}
    assert (data.records.modality == data.records.cam.map(SYSU_CAMERAS)).all()


def test_names_endings_strays_and_folders_above_do_not_matter(bases, tmp_path):
    root = tmp_path / "cam1" / "cam5 0042" / "data"
    shutil.copytree(bases["sysu"], root)
    before = read("sysu", bases["sysu"]).records
    for path in before.path[:20]: (root / path).rename((root / path).with_suffix(".JPG"))
    for stray in "Thumbs.db", ".DS_Store", "._0001.jpg": (root / "cam1" / Path(before.path[0]).parts[1] / stray).write_bytes(b"\0stray")
    after = read("sysu", root).records
    assert after.drop(columns="path").equals(before.drop(columns="path"))
    assert not verify("sysu", root).problems


@pytest.mark.parametrize("name", ["regdb", "llcm"])
def test_endings_in_lists_and_on_disk_may_differ_in_case(copy, name):
    root = copy(name)
    before = read(name, root).records
    for text in (root / "idx").glob("train_*.txt"): text.write_text(text.read_text().replace(".jpg", ".JPG").replace(".bmp", ".Bmp"))
    pd.testing.assert_frame_equal(read(name, root).records, before)
    assert not verify(name, root).problems
    for path in before.path[::2]: (root / path).rename((root / path).with_suffix(Path(path).suffix.upper()))
    after = read(name, root).records
    assert all((root / p).is_file() for p in after.path) and after.drop(columns="path").equals(before.drop(columns="path")) and not verify(name, root).problems


def test_regdb_takes_the_identity_from_the_folder_and_trials_differ(bases):
    one, two = read_regdb(bases["regdb"], 1), read_regdb(bases["regdb"], 2)
    assert (one.records.pid == one.records.path.str.split("/").str[1].astype(int)).all()
    assert set(one.train.pid) != set(two.train.pid) and one.records.path.equals(two.records.path)
    with pytest.raises(UserError, match="trial = 11: expected a number from 1 to 10"): read_regdb(bases["regdb"], 11)


def test_llcm_takes_cameras_from_names_in_training_and_folders_in_test(bases):
    r = read_llcm(bases["llcm"]).records
    train, test = r[r.split == "train"], r[r.split == "test"]
    assert (train.cam == train.path.str.extract(r"_c(\d+)_", expand=False).astype(int)).all()
    assert (test.cam == test.path.str.extract(r"/cam(\d+)/", expand=False).astype(int)).all()


def test_hold_out_drops_the_test_and_holds_out_training_identities(bases):
    for name in BASES:
        data = read(name, bases[name])
        held = hold_out(data)
        assert not set(held.records.pid) & set(data.test.pid) and set(held.records.pid) == set(data.train.pid)
        assert len(held.test) and len(held.train) and held.records.index.tolist() == list(range(len(held.records)))
    sysu = read("sysu", bases["sysu"])
    assert set(hold_out(sysu).test.pid) == set(sysu.records.pid[sysu.records.split == "val"])


def test_class_labels_are_sorted_and_complete(bases):
    train = read("llcm", bases["llcm"]).train
    labels = class_labels(train.sample(frac=1, random_state=0))
    assert list(labels) == sorted(set(train.pid)) and list(labels.values()) == list(range(len(labels)))


# --- bad input: what is done to a dataset, and what the message must say

def png_header(width, height):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def empty(root): f = first(root); f.write_bytes(b""); return f
def text(root): f = first(root); f.write_text("hello\n"); return f
def tiny(root): f = first(root); Image.new("RGB", (1, 1)).save(f); return f
def huge(root): f = first(root); f.write_bytes(png_header(20000, 20000)); return f
def large(root): f = first(root); f.write_bytes(png_header(8000, 8000)); return f

BAD_IMAGES = [(cut, "is damaged"), (empty, "is empty"), (text, "is no readable image"), (tiny, "1×1 pixels, too small or too large"), (huge, "is no readable image"), (large, "8000×8000 pixels, too small or too large")]


@pytest.mark.parametrize("damage, says", BAD_IMAGES, ids=[d.__name__ for d, _ in BAD_IMAGES])
def test_bad_image_is_named_by_cache_and_verify(copy, damage, says):
    root = copy("sysu")
    file = damage(root)
    for deep in False, True:
        (problem,) = verify("sysu", root, deep=deep).problems
        assert problem.startswith(str(file)) and says in problem and "copy it again" in problem
    with pytest.raises(UserError, match="1 of [0-9]+ images cannot be used") as e: cache_images(read("sysu", root), (32, 16))
    assert str(file) in str(e.value) and says in str(e.value)
    assert not list((root / ".di2l_cache").glob("*.np[yz]")), "a failed build leaves nothing that looks finished"


def test_all_bad_images_are_named_at_once(copy):
    root = copy("sysu")
    files = [root / p for p in read("sysu", root).records.path[5:8]]
    for f in files: f.write_bytes(b"")
    assert [p.partition(":")[0] for p in verify("sysu", root).problems] == sorted(map(str, files))
    with pytest.raises(UserError) as e: cache_images(read("sysu", root), (32, 16))
    assert all(str(f) in str(e.value) for f in files)


@pytest.mark.parametrize("mode, ending, pixel, expected", [
    ("CMYK", "jpg", (0, 255, 255, 0), (254, 0, 0)), ("L", "png", 77, (77, 77, 77)), ("I;16", "png", 77 * 256, (77, 77, 77)),
    ("RGBA", "png", (9, 8, 7, 255), (9, 8, 7)), ("P", "png", 0, (0, 0, 0)), ("1", "png", 1, (255, 255, 255)), ("LA", "png", (50, 255), (50, 50, 50))])
def test_every_mode_becomes_rgb(tmp_path, mode, ending, pixel, expected):
    file = tmp_path / f"image.{ending}"
    Image.new(mode, (10, 20), pixel).save(file)
    for size in None, (20, 10), (40, 20):
        image = read_image(file, size)
        assert image.shape == (*(size or (20, 10)), 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - expected).max() <= 2


def test_sixteen_bits_keep_their_contrast(tmp_path):
    grey = np.linspace(0, 65535, 200, dtype=np.uint16).reshape(20, 10)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png")[..., 0] == grey >> 8).all()


def write(root, name, content): (root / name).write_bytes(content if isinstance(content, bytes) else content.encode()); return root / name
def append(name, more): return lambda root: write(root, name, (root / name).read_text() + more)

def lose(name, folder, listed):
    def damage(root): (root / folder).rename(root / "elsewhere"); return root / listed
    damage.__name__ = f"no_{folder.replace('/', '_')}"
    return damage


def lose_image(root): f = root / read_list(root, "idx/test_thermal_1.txt")[3][0]; f.unlink(); return f
def double_line(root): name = "idx/train_visible_1.txt"; (path, label), *_ = read_list(root, name); append(name, f"{path} {label}\n")(root); return root / path
def double_file(root): f = first(root); shutil.copy(f, f.with_suffix(".png")); return f.with_suffix(".png")
def same_in_test(root):
    path, label = read_list(root, "idx/train_visible_1.txt")[0]
    append("idx/test_visible_1.txt", f"{path} {label}\n")(root)
    return root / "idx"
def id_in_two(root): write(root, "exp/val_id.txt", ",".join(map(str, [*read_ids(root / "exp/val_id.txt"), read_ids(root / "exp/train_id.txt")[0]]))); return root / "exp/val_id.txt"

BAD_TREES = {
    "a label that is no number": ("sysu", lambda r: write(r, "exp/test_id.txt", "6,abc,17"), "'abc' is no identity; expected whole numbers"),
    "a label that is no number in a list": ("regdb", lambda r: write(r, "idx/train_visible_1.txt", "Visible/1/a.bmp one"), "line 1 is .*expected a path and a number"),
    "an empty split file": ("sysu", lambda r: write(r, "exp/test_id.txt", "\n"), "lists nothing"),
    "an identity in two splits": ("sysu", id_in_two, "is in train_id too"),
    "an identity without an image": ("sysu", lambda r: write(r, "exp/test_id.txt", "999999"), "identity 999999 has no image"),
    "a split file that is missing": ("sysu", lambda r: (r / "exp/test_id.txt").unlink() or r / "exp/test_id.txt", "cannot be read"),
    "a split file that is no text": ("sysu", lambda r: write(r, "exp/test_id.txt", b"\xff\xfe\x00\xd8"), "is no split file"),
    "a missing image": ("regdb", lose_image, "is missing, though idx/test_thermal_1.txt names it"),
    "a duplicate line": ("regdb", double_line, "listed twice"),
    "a duplicate file": ("sysu", double_file, "once more.*remove one of the two"),
    "an identity in training and test": ("regdb", same_in_test, "is in training and test of trial 1"),
    "a path that climbs out": ("regdb", lambda r: write(r, "idx/train_visible_1.txt", "Visible/../../secret.bmp 0"), "leads out of the dataset's folder"),
    "an absolute path": ("llcm", lambda r: write(r, "idx/train_vis.txt", "/etc/passwd 0"), "leads out of the dataset's folder"),
    "a Windows path that climbs out": ("llcm", lambda r: write(r, "idx/train_vis.txt", "vis\\..\\..\\a.jpg 0"), "leads out of the dataset's folder"),
    "a missing list": ("llcm", lambda r: (r / "idx/train_nir.txt").unlink() or r / "idx/train_nir.txt", "cannot be read"),
    "a test identity without an image": ("llcm", lambda r: write(r, "idx/test_id.txt", "99999"), "identity 99999 has no image"),
}


@pytest.mark.parametrize("what", BAD_TREES)
def test_bad_tree_is_refused_by_the_reader_and_reported_by_verify(copy, what):
    name, damage, says = BAD_TREES[what]
    root = copy(name)
    file = damage(root)
    with pytest.raises(UserError, match=says) as e: read(name, root)
    assert str(file) in str(e.value)
    report = verify(name, root)
    assert not report.ok and any(str(file) in p for p in report.problems)


def test_windows_line_endings_and_byte_order_mark_change_nothing(copy):
    for name in BASES:
        root = copy(name)
        before = read(name, root).records
        for file in [*root.glob("exp/*.txt"), *root.glob("idx/*.txt")]: file.write_bytes(b"\xef\xbb\xbf" + file.read_text().replace("\n", "\r\n").encode() + b"\r\n\r\n")
        pd.testing.assert_frame_equal(read(name, root).records, before)


def test_windows_separators_in_lists(copy):
    root = copy("regdb")
    before = read("regdb", root).records
    for file in root.glob("idx/*.txt"): file.write_text(file.read_text().replace("/", "\\"))
    pd.testing.assert_frame_equal(read("regdb", root).records, before)


def test_unreadable_folder_is_named(copy, monkeypatch):
    root, real = copy("sysu"), os.scandir
    locked = first(root).parent
    def scandir(path="."):
        if Path(path) == locked: raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="cannot be read .Permission denied.*chmod") as e: read("sysu", root)
    assert str(locked) in str(e.value)
    assert any(str(locked) in p for p in verify("sysu", root).problems)


CLOSE = """
import json, os, sys, warnings
from di2l.console import UserError
from di2l.data.checker import verify
from di2l.data.records import read_dataset
warnings.simplefilter("ignore")
name, root, folders = sys.argv[1], sys.argv[2], sys.argv[3:]
for folder in folders:
    for mode in 0o000, 0o444, 0o111:
        os.chmod(folder, mode)
        if os.access(folder, os.R_OK | os.X_OK): sys.exit("this user may read everything")
        try: found = verify(name, root).problems
        except UserError as e: found = [str(e)]
        try: said = read_dataset(name, root) and "nothing"
        except UserError as e: said = str(e)
        finally: os.chmod(folder, 0o755)
        print(json.dumps([folder, found, said, mode]))
"""

@pytest.mark.parametrize("name, other, folders", [
    ("sysu", "cam1", ["", "exp", "cam3", "cam3/*"]), ("regdb", "Thermal", ["", "Visible", "Visible/1", "idx"]), ("llcm", "nir", ["vis", "vis/*", "test_vis", "test_vis/cam1", "idx"])])
def test_closed_folders_are_named_and_the_rest_is_verified(copy, name, other, folders):
    root = copy(name)
    folders, bad = [str(next(root.glob(f))) if f else str(root) for f in folders], next(root.glob(f"{other}/**/*.*[gp]"))
    bad.write_bytes(b"")
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"] if getattr(os, "geteuid", int)() == 0 else []
    if drop and not shutil.which("setpriv"): pytest.skip("root may read everything, and there is no setpriv to take that away")
    done = subprocess.run([*drop, sys.executable, "-c", CLOSE, name, str(root), *folders], capture_output=True, text=True)
    if "may read everything" in done.stderr or "setpriv: " in done.stderr: pytest.skip("no folder is closed to this user")
    assert done.returncode == 0, done.stderr
    for closed, found, said, mode in map(json.loads, done.stdout.splitlines()):
        told = f"{closed}: cannot be read (Permission denied); make it readable (chmod -R u+rX)"
        listed = mode == 0o111 and name != "sysu"                                # a list may name images in a folder whose names are hidden
        assert (said == told or listed and said == "nothing") and found.count(told) == 1, (closed, said, found)
        if closed != str(root): assert any(p.startswith(f"{bad}: is empty") for p in found) and not [p for p in found if p.startswith(f"{closed}/")], (closed, found)


def test_wrong_folder_says_which_one_was_meant(bases, tmp_path):
    with pytest.raises(UserError, match="is no folder"): read_sysu(tmp_path / "nothing")
    with pytest.raises(UserError, match="cam1, .* not found.*unpacked"): read_sysu(tmp_path)
    with pytest.raises(UserError, match=f"it seems to be {bases['sysu']}"): read_sysu(bases["sysu"].parent)
    with pytest.raises(UserError, match="dataset = 'market'; there are sysu, regdb, llcm"): read_dataset("market", tmp_path)


def test_what_no_split_names_is_said(copy):
    with pytest.warns(UserWarning, match="1 identities are in no split file"): read_sysu(copy("sysu"))


def test_misplaced_folder_is_said_and_reported(copy):
    root = copy("sysu")
    shutil.move(first(root).parent, root / "cam1/backup")
    with pytest.warns(UserWarning, match="1 files or folders are left out, .*: cam1/backup$"): read_sysu(root)
    assert any("cam1/backup/" in p and "misplaced" in p for p in verify("sysu", root).problems)


def test_what_lies_where_images_should_and_is_left_out_is_said_once(copy):
    root = copy("sysu")
    files = sorted(first(root).parent.glob("*.jpg"))
    (files[0].parent / "sub").mkdir()
    files[0].rename(files[0].parent / "sub" / files[0].name), files[1].rename(files[1].with_suffix(".webp")), files[2].rename(files[2].with_suffix(".jpg.part")), files[3].rename(files[3].with_suffix(""))
    for stray in "Thumbs.db", ".DS_Store", "._0009.jpg", "desktop.ini": (files[0].parent / stray).write_bytes(b"stray")
    with pytest.warns(UserWarning) as said: read_sysu(root)
    folder = files[0].parent.relative_to(root).as_posix()
    (told,) = [str(w.message) for w in said if "left out, for they are no images" in str(w.message)]
    assert told.startswith("4 files or folders") and all(f"{folder}/{n}" in told for n in ("sub", "0002.webp", "0003.jpg.part", "0004")) and told.count(f"{folder}/") == 4

    root = copy("llcm")
    (root / "test_vis/cam2").rename(root / "test_vis/camera2")
    with pytest.warns(UserWarning, match="1 files or folders are left out, .*: test_vis/camera2$"): read_llcm(root)
    assert any("test_vis/camera2/" in p and "misplaced" in p for p in verify("llcm", root).problems)


def test_two_folders_of_one_identity_are_refused(copy):
    root = copy("sysu")
    folder = first(root).parent
    shutil.copytree(folder, folder.with_name(str(int(folder.name))))
    with pytest.raises(UserError, match="is the same identity as"): read("sysu", root)
    (problem,) = verify("sysu", root).problems
    assert problem.startswith(str(root / "cam1")) and "same identity" in problem


def test_numbers_too_large_for_a_table_are_no_identities(copy):
    root, large = copy("sysu"), "9" * 20
    shutil.copytree(first(root).parent, root / "cam1" / large)
    with pytest.warns(UserWarning, match=f"left out, .*cam1/{large}"): read_sysu(root)
    assert any(f"cam1/{large}/" in p and "misplaced" in p for p in verify("sysu", root).problems)
    write(root, "exp/test_id.txt", large)
    with pytest.raises(UserError, match="is no identity"): read("sysu", root)
    with pytest.raises(UserError, match=f"line 1 is .*{large}"): read_list(root, write(root, "list.txt", f"a.jpg {large}").name)


def test_identity_with_one_modality_is_kept_out_of_the_sampler_and_said_once(bases):
    train = read("sysu", bases["sysu"]).train
    lone = train.pid.iloc[0]
    train = train[(train.pid != lone) | (train.modality == "visible")]
    with pytest.warns(UserWarning, match=f"1 identities have one modality only and are not sampled: .{lone}]") as said: s = IdentitySampler(train, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = np.concatenate([np.concatenate(step) for step in s.epoch(0)])
    assert len(said) == 1 and lone not in set(train.pid[rows]) and lone in class_labels(train)


# --- cache

def test_cache_holds_what_decoding_gives(bases, tmp_path):
    for name in BASES:
        data = read(name, bases[name])
        cache = cache_images(data, (40, 24), tmp_path)
        assert cache.images.shape == (len(data.records), 40, 24, 3) and cache.images.dtype == np.uint8 and isinstance(cache.images, np.memmap)
        rows = [len(data.records) - 1, 0, 7, 7]
        batch = cache[rows]
        assert tuple(batch.shape) == (4, 3, 40, 24) and str(batch.dtype) == "torch.uint8"
        for image, row in zip(batch, rows):
            assert (image.permute(1, 2, 0).numpy() == read_image(bases[name] / data.records.path[row], (40, 24))).all()
            assert (cache.images[row] == image.permute(1, 2, 0).numpy()).all()
        with pytest.raises(IndexError): cache[[len(data.records)]]
        again = cache.read([3, 2, 1, 0], out=batch)                           # into the memory of the batch before
        assert again.data_ptr() == batch.data_ptr() and torch.equal(again, cache[[3, 2, 1, 0]]) and len(cache.read([5], out=batch)) == 1


def test_held_out_data_and_other_trials_use_the_same_file(bases, tmp_path):
    data = read("regdb", bases["regdb"])
    whole, held = cache_images(data, (40, 24), tmp_path), cache_images(hold_out(data), (40, 24), tmp_path)
    other = cache_images(read_regdb(bases["regdb"], 2), (40, 24), tmp_path)
    assert whole.path == held.path == other.path and len(held) == len(hold_out(data).records)
    row = len(held) - 1
    expected = read_image(bases["regdb"] / hold_out(data).records.path[row], (40, 24))
    assert (held[row][0].permute(1, 2, 0).numpy() == expected).all() and (np.array(held.images)[row] == expected).all()


def built(monkeypatch):
    calls = []
    real = image_cache.decode
    monkeypatch.setattr(image_cache, "decode", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


def test_cache_is_built_once_and_again_for_a_changed_file_or_size(copy, monkeypatch):
    root, calls = copy("regdb"), built(monkeypatch)
    data = read("regdb", root)
    cache_images(data, (40, 24)); n = len(calls)
    assert n == len(data.records)
    cache_images(data, (40, 24)); assert len(calls) == n
    cache_images(data, (24, 12)); assert len(calls) == 2 * n
    file, keep = root / data.records.path[3], (root / data.records.path[3]).stat()
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)          # same size in bytes
    os.utime(file, ns=(keep.st_atime_ns, keep.st_mtime_ns))                 # and the same time
    assert (cache_images(data, (40, 24))[3][0].permute(1, 2, 0).numpy() == read_image(file, (40, 24))).all()
    assert len(list((root / ".di2l_cache").glob("*40x24*.npy"))) == 1, "the outdated file is removed"


def test_touched_or_copied_files_do_not_rebuild(copy, monkeypatch):
    root, calls = copy("regdb"), built(monkeypatch)
    data = read("regdb", root)
    cache_images(data, (40, 24)); n = len(calls)
    for p in data.records.path: (root / p).touch()
    cache_images(data, (40, 24))
    shutil.copytree(root, root.parent / "copy")
    cache_images(read("regdb", root.parent / "copy"), (40, 24))
    assert len(calls) == n


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["interrupted", "disk full"])
def test_interrupted_build_leaves_nothing_that_looks_finished(copy, monkeypatch, error):
    data, real, seen = read("regdb", copy("regdb")), image_cache._write_at, []
    def write_at(*args):
        seen.append(1)
        if len(seen) > 50: raise error
        return real(*args)
    monkeypatch.setattr(image_cache, "_write_at", write_at)
    with pytest.raises((KeyboardInterrupt, UserError), match="No space left on device; free some space|^$"): cache_images(data, (40, 24))
    folder = data.root / ".di2l_cache"
    assert not list(folder.glob("*.npz")) and not list(folder.glob("*.npy"))
    monkeypatch.setattr(image_cache, "_write_at", real)
    cache = cache_images(data, (40, 24))
    assert (cache[5][0].permute(1, 2, 0).numpy() == read_image(data.root / data.records.path[5], (40, 24))).all()
    assert not list(folder.glob("*.partial"))


def test_killed_process_leaves_nothing_that_looks_finished(copy):
    root = copy("regdb")
    code = ("import os; from di2l.data import cache as d; from di2l.data.records import read_regdb; real, n = d._write_at, [0]\n"
            "def write_at(*a):\n n[0] += 1\n if n[0] > 50: os._exit(9)\n return real(*a)\n"
            f"d._write_at = write_at; d.cache_images(read_regdb({str(root)!r}), (40, 24))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not list((root / ".di2l_cache").glob("*.np[yz]"))
    assert len(cache_images(read("regdb", root), (40, 24))) and not list((root / ".di2l_cache").glob("*.partial"))


def test_damaged_cache_is_built_again(copy):
    data = read("regdb", copy("regdb"))
    cache_images(data, (40, 24))
    (index,) = (data.root / ".di2l_cache").glob("*.npz")
    for file in index, index.parent / str(np.load(index)["store"]):
        file.write_bytes(file.read_bytes()[:1000])
        assert cache_images(data, (40, 24))[[len(data.records) - 1]].shape == (1, 3, 40, 24)


def test_cache_damaged_at_any_place_is_built_again(copy):
    "Every byte of the headers and some of the rest; NumPy meets them with errors of many kinds."
    data = read("regdb", copy("regdb"))
    cache = cache_images(data, (16, 8))
    (index,), paths, rng = (data.root / ".di2l_cache").glob("*.npz"), sorted(data.records.path), np.random.default_rng(0)
    for file in index, cache.path:
        good = file.read_bytes()
        for place in [*range(128), *rng.integers(0, len(good), 60), *(len(good) - rng.integers(1, 300, 60))]:
            file.write_bytes(good[:place] + bytes([good[place] ^ int(rng.integers(1, 256))]) + good[place + 1:])
            assert (image_cache._finished(index, data.root, paths, (16, 8)) or [None])[0] in (None, cache.path)
        file.write_bytes(good)
    for place in 0, 7, 20, 70:
        cache.path.write_bytes(good[:place] + b"\xff" + good[place + 1:])                                   # as long as before
        assert torch.equal(cache_images(data, (16, 8))[[5]], cache[[5]])


def test_a_cache_copied_with_its_dataset_is_opened_by_many_processes_at_once(copy):
    "Each finds all files touched and the index to be renewed."
    import multiprocessing
    data = read("regdb", copy("regdb"))
    cache_images(data, (16, 8))
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(8), context.SimpleQueue()
    def one():
        for _ in range(5):
            barrier.wait(60)
            try: cache_images(data, (16, 8)); said.put("")
            except Exception as e: said.put(f"{type(e).__name__}: {e}")
            if not barrier.wait(60): [(data.root / p).touch() for p in data.records.path]
    processes = [context.Process(target=one) for _ in range(8)]
    for p in data.records.path: (data.root / p).touch()
    for p in processes: p.start()
    for p in processes: p.join(120)
    assert [p.exitcode for p in processes] == [0] * 8 and [said.get() for _ in range(40)] == [""] * 40


def test_cache_is_shared_by_processes_and_threads(copy, monkeypatch):
    root, calls = copy("regdb"), built(monkeypatch)
    data, got = read("regdb", root), []
    threads = [threading.Thread(target=lambda: got.append(cache_images(data, (40, 24)).path)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(got)) == 1 and len(calls) == len(data.records), "one builds, the others wait"
    cache = cache_images(data, (40, 24))
    again = pickle.loads(pickle.dumps(cache))
    assert (again[[1, 2]] == cache[[1, 2]]).all()


def test_cache_goes_to_the_users_folder_where_the_data_cannot_be_written(copy, tmp_path, monkeypatch):
    data, real = read("regdb", copy("regdb")), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with pytest.warns(UserWarning, match="home.*cannot be written"): cache = cache_images(data, (40, 24))
    assert tmp_path / "home" in cache.path.parents and not (data.root / ".di2l_cache").exists()


def test_a_finished_cache_beside_read_only_data_is_used(copy, tmp_path, monkeypatch):
    data, real = read("regdb", copy("regdb")), os.access
    first = cache_images(data, (40, 24))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_images(data, (40, 24)).path == first.path and not (tmp_path / "home").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning), pytest.raises(UserError, match="set XDG_CACHE_HOME"): cache_images(data, (48, 24))


def test_a_cache_that_shrinks_while_open_is_said(copy, tmp_path):
    cache = cache_images(read("regdb", copy("regdb")), (40, 24), tmp_path)
    os.truncate(cache.path, cache.pixels.offset + 40 * 24 * 3)
    with pytest.raises(UserError, match="has become shorter"): cache[[1]]


def test_an_open_cache_outlives_its_rebuilding(copy):
    data = read("regdb", copy("regdb"))
    open_, expected = cache_images(data, (16, 8)), cache_images(data, (16, 8))[[3]]
    Image.new("RGB", (16, 32), (9, 9, 9)).save(data.root / data.records.path[3])
    assert not torch.equal(cache_images(data, (16, 8))[[3]], expected) and not open_.path.exists()
    assert torch.equal(open_[[3]], expected)
    with pytest.raises(UserError, match="was built anew or removed: call cache_images again"): pickle.loads(pickle.dumps(open_))


# --- sampler

def made_up(visible, infrared, start=0):
    "Records of identities with so many images each."
    rows = [(p, m) for p, pair in enumerate(zip(visible, infrared)) for m, n in zip(("visible", "infrared"), pair) for _ in range(n)]
    return pd.DataFrame(rows, columns=["pid", "modality"], index=range(start, start + len(rows))).sample(frac=1, random_state=1)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=5, max_size=23), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.integers(0, 3))
def test_sampler_is_fair_for_any_data(images, ids, visible, infrared, seed, epoch):
    r = made_up(*zip(*images), start=1000)
    s = IdentitySampler(r, ids, visible, infrared, seed=seed)
    steps = s.epoch(epoch)
    assert len(steps) == len(s)
    served = np.zeros(len(images), int)
    for v, i in steps:
        assert (r.modality[v] == "visible").all() and (r.modality[i] == "infrared").all()
        vp, ip = r.pid[v].to_numpy().reshape(ids, visible), r.pid[i].to_numpy().reshape(ids, infrared)
        assert (vp == vp[:, :1]).all() and (ip == ip[:, :1]).all() and (vp[:, 0] == ip[:, 0]).all() and len(set(vp[:, 0])) == ids
        served[vp[:, 0]] += 1
        for block, k in ((v.reshape(ids, -1), 0), (i.reshape(ids, -1), 1)):
            for person, rows in zip(vp[:, 0], block): assert len(set(rows)) == min(images[person][k], len(rows)), "no image twice where there are enough"
    assert (served == s.repeats).all()
    for k, n in enumerate((visible, infrared)):  # within an epoch an identity's images are used equally often, give or take one
        used = np.bincount(np.concatenate([step[k] for step in steps]) - 1000, minlength=len(r))
        for p in range(len(images)):
            u = used[r.index[(r.pid == p) & (r.modality == ("visible", "infrared")[k])] - 1000]
            assert u.max() - u.min() <= 1


def test_epochs_depend_on_seed_and_number_alone():
    r = made_up([9] * 30, [7] * 30)
    a, b = IdentitySampler(r, seed=5), IdentitySampler(r.sample(frac=1, random_state=9).sort_index(), seed=5)
    b.epoch(0), b.epoch(1)
    same = lambda x, y: all((v == w).all() and (i == j).all() for (v, i), (w, j) in zip(x, y))
    assert same(IdentitySampler(r.sort_index(), seed=5).epoch(3), b.epoch(3)) and same(a.epoch(3), a.epoch(3))
    assert not same(a.epoch(3), a.epoch(4)) and not same(a.epoch(3), IdentitySampler(r, seed=6).epoch(3))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_share_a_batch_without_overlap(world):
    r = made_up([9] * 30, [7] * 30)
    whole = IdentitySampler(r).epoch(2)
    parts = [IdentitySampler(r, rank=k, world=world).epoch(2) for k in range(world)]
    for step, (v, i) in enumerate(whole):
        assert np.concatenate([p[step][0] for p in parts]).tolist() == v.tolist() and np.concatenate([p[step][1] for p in parts]).tolist() == i.tolist()


def test_epoch_length_is_what_it_says():
    r = made_up([56] * 395, [30] * 395)
    s = IdentitySampler(r)
    assert len(s) == len(s.epoch(0)) == 395 * s.repeats // 8 == 790 and "790 steps an epoch: 395 identities, each served 16 times" in repr(s)


def test_sampler_refuses_what_cannot_be():
    r = made_up([4] * 6, [4] * 6)
    with pytest.raises(UserError, match="6 identities have both modalities, and a batch needs 8"): IdentitySampler(r)
    with pytest.raises(UserError, match="ids = 4 cannot be shared by 3 processes"): IdentitySampler(r, 4, world=3)
    for wrong in (dict(world=0), dict(world=-2), dict(rank=5, world=2), dict(rank=-1, world=2), dict(rank=1)):
        with pytest.raises(UserError, match="that share a batch"): IdentitySampler(r, 4, **wrong)
    for wrong in (dict(ids=0), dict(visible=0), dict(infrared=-1)):
        with pytest.raises(UserError, match="expected a whole number, 1 or more"): IdentitySampler(r, **{"ids": 4, **wrong})


def test_ten_thousand_identities_and_a_million_images():
    import time
    r = pd.DataFrame(dict(pid=np.repeat(np.arange(10_000), 100), modality=np.tile(np.repeat(["visible", "infrared"], 50), 10_000)))
    start = time.process_time()
    steps = IdentitySampler(r).epoch(0)
    taken = time.process_time() - start
    assert len(steps) == 15_000 and taken < 20, f"{taken:.1f} s"


def test_totals_without_the_permutations_agree_with_them(sysu_protocol_files):
    official, even = sysu_counts(sysu_protocol_files / "rand_perm_cam.mat"), sysu_counts()
    for counts, splits in official, even: assert {k: len(v) for k, v in splits.items()} == dict(train=296, val=99, test=96)
    for split in "train", "val", "test":
        for cam in SYSU_CAMERAS:
            a, b = ([n for (c, p), n in counts.items() if c == cam and p in set(splits[split])] for counts, splits in (official, even))
            assert (sum(a), len(a)) == (sum(b), len(b)), (split, cam)
    assert sum(official[0].values()) == sum(even[0].values()) == 45863 and len(official[0]) == len(even[0])


def test_true_scale_is_read_and_verified(true_scale):
    import time
    report = verify("sysu", true_scale)
    assert report.ok and "30071" in str(report)
    start = time.process_time()                                                     # what else the machine does is not ours
    data = read("sysu", true_scale)
    assert time.process_time() - start < 5
    assert len(data.train) == 22258 + 11909 and len(data.test) == 6775 + 3803 and len(class_labels(data.train)) == 395
    assert len(IdentitySampler(data.train)) == 790


def test_the_papers_preset_takes_its_first_steps_at_true_scale(true_scale, tmp_path):
    "All of it but the size of the images and the download of weights."
    from di2l.runs.config import config
    from di2l.runs.log import read_log
    from di2l.train import train
    c = config("paper-sysu", root=str(true_scale), weights=None, size=(48, 16), steps=2, device="cpu")
    out = train(c, tmp_path / "run", quiet=True)
    about, log = json.loads((out / "config.json").read_text()), read_log(out)
    assert about["num_ids"] == 395 and len(log) == 2 and np.isfinite(log.loss).all() and about["config"]["settings"]["backbone"] == "resnet50"
    assert abs(log.focal[0] - np.log(395) * (1 - 1 / 395) ** 2) < 0.5                 # an untrained classifier of 395 identities


@pytest.fixture
def moved(true_scale):
    "Take an image of the true-scale tree away, or elsewhere in it, until the test is over."
    done = []
    def move(image, to=None):
        kept = image.read_bytes()
        if to is not None: to.write_bytes(kept); done.append(lambda: to.unlink(missing_ok=True))
        image.unlink()
        done.append(lambda: image.write_bytes(kept))
    yield move
    for undo in done[::-1]: undo()


def test_verify_names_the_lost_images_among_45863(true_scale, moved, request):
    folder = sorted((true_scale / "cam5").iterdir())[50]
    lost = folder / "0003.jpg"
    moved(lost), moved(lost.with_name("0004.jpg"))
    report = verify("sysu", true_scale)
    assert report.problems == [f"{folder}/000{k}.*: is missing; copy it again from the dataset's archive" for k in (3, 4)] and ("camera 5 (visible)", 8224, 8222) in counts(report)
    assert any("--permutations rand_perm_cam.mat" in n for n in report.notes)
    if "official" not in json.loads((true_scale / "standin.json").read_text())["counts"]: pytest.skip("the stand-in was made without the permutations")
    (problem,) = verify("sysu", true_scale, permutations=request.getfixturevalue("sysu_protocol_files") / "rand_perm_cam.mat").problems
    assert problem.startswith(f"{folder}: has {len(list(folder.iterdir()))} images")


def test_verify_points_to_the_permutations_where_the_last_image_of_a_folder_is_lost(true_scale, moved):
    moved(sorted(sorted((true_scale / "cam5").iterdir())[50].iterdir())[-1])
    report = verify("sysu", true_scale)
    assert not report.ok and not report.problems and any("names every folder with a wrong count" in n for n in report.notes)


def test_verify_names_an_image_of_somebody_whom_the_camera_never_saw(true_scale, moved, sysu_protocol_files):
    if "official" not in json.loads((true_scale / "standin.json").read_text())["counts"]: pytest.skip("the stand-in was made without the permutations")
    image, stranger = sorted((true_scale / "cam5/0001").iterdir())[-1], true_scale / "cam5/9000"
    stranger.mkdir()
    try:
        moved(image, stranger / "0001.jpg")
        problems = verify("sysu", true_scale, permutations=sysu_protocol_files / "rand_perm_cam.mat").problems
        assert [p.partition(",")[0] for p in problems] == [f"{image.parent}: has {len(list(image.parent.iterdir()))} images", f"{stranger}: has 1 images"]
    finally: shutil.rmtree(stranger)


def test_permutations_may_lie_alone(true_scale, sysu_protocol_files, tmp_path):
    "The command of the README: the identities are in the dataset's own exp."
    shutil.copy(sysu_protocol_files / "rand_perm_cam.mat", tmp_path)
    if "official" in json.loads((true_scale / "standin.json").read_text())["counts"]: assert verify("sysu", true_scale, permutations=tmp_path / "rand_perm_cam.mat").ok
    with pytest.raises(FileNotFoundError, match="train_id.mat"): sysu_counts(tmp_path / "rand_perm_cam.mat")


def test_full_regdb_standin_is_complete(scratch):
    root = write_standin("regdb", scratch / "regdb", size=(16, 8))
    report = verify("regdb", root)
    assert report.ok and ("identities with 10 + 10 images", 412, 412) in counts(report)
    data = read_regdb(root, 10)
    assert (len(data.train), len(data.test), data.train.pid.nunique()) == (4120, 4120, 206)


def test_llcm_standin_plans_the_published_counts():
    files, texts = llcm_plan(1)
    assert len(files) == 46767 and len({f[1] for f in files}) == 1064
    assert [len(texts[f"idx/train_{k}.txt"].split("\n")) for k in ("vis", "nir")] == [16946, 13975] and len(texts["idx/test_id.txt"].split(",")) == 351


def notebook_pictures(folder, monkeypatch):
    "What the notebook's cells that draw the dataset at hand leave behind, and their figures."
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    notebook = json.loads((Path(__file__).resolve().parents[1] / "nbs/01_data.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    monkeypatch.setenv("DI2L_DATA", str(folder))
    names = dict(vars(records))
    plt.close("all")                                   # what other tests left open is none of these cells
    with plt.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mark in "import matplotlib", "\nkinds = {", "counts = data", "per = counts", "def skipped":
            (cell,) = [c for c in cells if mark in c]
            exec(cell, names)
        figures = [plt.figure(n) for n in plt.get_fignums()]
        for f in figures: f.canvas.draw()
        plt.close("all")
    return names, figures


@pytest.mark.parametrize("name, folders, rows, cams", [
    ("sysu", ["SYSU-MM01", "RegDB", "LLCM"], 6, 4), ("regdb", ["RegDB", "LLCM"], 2, 1), ("llcm", ["LLCM"], 18, 9), (None, [], 6, 4)])
def test_notebook_draws_the_dataset_at_hand(bases, tmp_path, monkeypatch, name, folders, rows, cams):
    for f in folders: (tmp_path / f).symlink_to(bases[{"SYSU-MM01": "sysu"}.get(f, f.lower())])
    names, (heat, imbalance, protocol) = notebook_pictures(tmp_path, monkeypatch)
    assert names["real"] == (folders[0] if folders else None) and heat.axes[0].get_xlabel() == f"identities ({names['what']})"
    assert len(heat.axes[0].get_yticklabels()) == rows and names["table"].shape == (rows, names["counts"].pid.nunique())
    data = read(name, bases[name]) if name else names["data"]
    assert int(names["counts"].images.sum()) == len(data.records)
    query, *gallery = protocol.axes
    assert query.images and any(a.images for a in gallery) and len(gallery) == len(names["cams"]) * len(names["pids"]) and len(names["cams"]) <= cams
    names["folder"].cleanup()


def test_standin_refuses_a_folder_in_use(bases):
    with pytest.raises(UserError, match="is not empty"): write_standin("sysu", bases["sysu"])
    with pytest.raises(UserError, match="dataset = 'cuhk'; there are"): write_standin("cuhk", bases["sysu"].parent / "new")


# --- what di2l_verify must not overlook

@pytest.mark.parametrize("deep", [False, True])
def test_images_behind_a_link_are_looked_into(copy, deep):
    root = copy("sysu")
    (root / "cam6").rename(root.parent / "disk2")
    (root / "cam6").symlink_to(root.parent / "disk2")
    (root / "cam1/circle").symlink_to(root), (root / "above").symlink_to(root.parent), (root.parent / "disk2/0001/circle").symlink_to(root.parent / "disk2")
    assert not verify("sysu", root, deep).problems
    emptied = sorted((root / "cam6").glob("*/*.jpg"))[:20]
    for f in emptied: f.write_bytes(b"")
    shutil.move(first(root), root.parent / "disk2/misplaced.jpg")
    problems = verify("sysu", root, deep).problems
    assert [p.partition(":")[0] for p in problems if "is empty" in p] == list(map(str, emptied)) and any("cam6/misplaced.jpg: is misplaced" in p for p in problems)


def test_two_cameras_behind_one_folder_are_both_looked_into(copy):
    root = copy("sysu")
    shutil.rmtree(root / "cam6"); (root / "cam6").symlink_to(root / "cam3")
    empty = sorted((root / "cam3").glob("*/*.jpg"))[0]
    empty.write_bytes(b"")
    assert {p.partition(":")[0] for p in verify("sysu", root).problems if "is empty" in p} == {str(empty), str(empty).replace("cam3", "cam6")}


def folder_for_image(root): f = first(root, "regdb"); f.unlink(); f.mkdir(); return f
def listed_gif(root):
    f = first(root, "regdb"); f.unlink()
    for t in (root / "idx").glob("*.txt"): t.write_text(t.read_text().replace(f.name, f"{f.stem}.gif"))
    return write(root, f.relative_to(root).with_suffix(".gif"), b"")

@pytest.mark.parametrize("damage, says", [(folder_for_image, "cannot be read"), (listed_gif, "is empty")])
def test_what_a_list_names_is_looked_into_whatever_it_is(copy, damage, says):
    root = copy("regdb")
    file = damage(root)
    (problem,) = verify("regdb", root).problems
    assert problem.startswith(f"{file}: ") and says in problem


@pytest.mark.parametrize("ending", ["bmp", "tiff", "jpg", "png"])
def test_truncation_shows_whatever_the_last_bytes_are(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    Image.new("RGB", (16, 32), (63, 63, 63)).save(file)                                                     # 63 is "?"
    for deep in False, True: _check_image(file, deep)
    file.write_bytes(file.read_bytes()[:-100 if ending in ("jpg", "png") else 800] + b"????")
    for deep in False, True:
        with pytest.raises(UserError, match="is damaged|is truncated|no readable image"): _check_image(file, deep)


def test_jpeg_filled_with_zeros_to_its_old_size_is_truncated(tmp_path):
    file, noise = tmp_path / "a.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 32, 3), dtype=np.uint8))
    noise.resize((8, 8)).save(tmp_path / "preview.jpg")
    preview = (tmp_path / "preview.jpg").read_bytes()
    header = b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview                                  # has an end-of-image marker of its own
    for kind in dict(progressive=True), {}:
        noise.save(file, quality=90, **kind)
        data = file.read_bytes()
        whole = data[:2] + b"\xff" + header + data[2:]                                                       # and a fill byte
        for tail in b"", b"\0" * 5000, b"what a camera adds " * 20:
            for deep in False, True: file.write_bytes(whole + tail); _check_image(file, deep)
        for deep in False, True:
            file.write_bytes(whole[:len(whole) // 2 + 500] + bytes(len(whole) // 2 - 500))
            with pytest.raises(UserError, match="a.jpg: is truncated, for it has no end-of-image marker; copy it again|is damaged"): _check_image(file, deep)
    assert read_image(file).shape == (64, 32, 3), "which PIL decodes without a word"


@pytest.mark.parametrize("name, own, other", [("regdb", "visible", "Thermal"), ("regdb", "thermal", "Visible"), ("llcm", "vis", "nir")])
def test_exchanged_lists_are_refused(copy, name, own, other):
    root, end = copy(name), "_1.txt" if name == "regdb" else ".txt"
    file, wrong = root / f"idx/train_{own}{end}", root / f"idx/train_{other.lower()}{end}"
    kept, number = file.read_text(), len(wrong.read_text().splitlines())
    file.write_text(wrong.read_text()), wrong.write_text(kept)
    with pytest.raises(UserError, match=f"names [0-9]+ images of ({other}|{own.title() if name == 'regdb' else own}), such as"): read(name, root)
    problems = verify(name, root).problems
    assert any(p.startswith(f"{file}: names {number} images of {other}, such as {other}/") for p in problems) and any(p.startswith(f"{wrong}: names ") for p in problems)


def test_benchmark_of_the_cache_records_both_clocks(tmp_path):
    script = Path(__file__).resolve().parents[1] / "benchmarks/datasets.py"
    subprocess.run([sys.executable, str(script), "--only", "cache", "--images", "8", "--rounds", "1", "--out", str(tmp_path / "found.json")], check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["cache_build_over_decoding"] > 0 and found["cache_build_over_decoding_wall"] > 0


def test_progress_is_silent_where_nobody_looks(capsys):
    assert list(progress(range(3), desc="x")) == [0, 1, 2]
    with progress(total=2) as bar: bar.update(2); bar.set_postfix_str("y")
    assert capsys.readouterr() == ("", "")


def test_import_is_light():
    code = "import sys, di2l.data.records, di2l.data.cache, di2l.data.checker; print([m for m in ('torch', 'pandas', 'scipy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

# --- files from strangers

def test_postscript_that_calls_itself_jpg_is_not_run(tmp_path):
    Image.new("RGB", (16, 32)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "person.jpg")
    with pytest.raises(UserError, match="person.jpg: is no readable image"): read_image(tmp_path / "person.jpg")


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, RuntimeError, AttributeError, MemoryError, struct.error, KeyError, ZeroDivisionError])
def test_whatever_pil_raises_names_the_image(tmp_path, monkeypatch, error):
    from PIL import ImageFile
    file = tmp_path / "a.png"
    Image.new("RGB", (16, 32)).save(file)
    def fail(*_, **__): raise error("inside")
    with monkeypatch.context() as m:
        m.setattr(ImageFile.ImageFile, "load", fail)
        with pytest.raises(UserError, match=f"a.png: is damaged .{error.__name__}.*copy it again"): read_image(file)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=f"a.png: is no readable image .{error.__name__}.*copy it again"): read_image(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_refused_instead_of_waited_for(copy):
    root = copy("sysu")
    file = first(root)
    file.unlink(), os.mkfifo(file)
    (problem,) = verify("sysu", root).problems
    assert problem.startswith(f"{file}: cannot be read (it is no file but a folder, pipe or device)")
    with pytest.raises(UserError, match="pipe or device"): cache_images(read("sysu", root), (32, 16))
    with pytest.raises(UserError, match="pipe or device"): read_image("/dev/zero")
    (root / "exp/test_id.txt").unlink(), os.mkfifo(root / "exp/test_id.txt")
    with pytest.raises(UserError, match="test_id.txt"): read("sysu", root)


def test_files_too_large_for_an_image_are_refused(tmp_path):
    with open(tmp_path / "a.jpg", "wb") as f: f.truncate(300_000_000)
    with pytest.raises(UserError, match="a.jpg: cannot be read .it has 300,000,000 bytes, far more than expected"): read_image(tmp_path / "a.jpg")


def test_a_name_that_is_no_utf8_is_named_by_readers_and_checker(copy):
    root = copy("sysu")
    file = Path(os.fsdecode(os.fsencode(first(root).parent) + b"/caf\xe9.jpg"))
    try: shutil.copy(first(root), file)
    except OSError: pytest.skip("this system takes UTF-8 names only")
    with pytest.raises(UserError, match="its name is no UTF-8 .*xe9.*rename it"): read("sysu", root)
    (problem,) = verify("sysu", root).problems
    assert problem.startswith(f"{file}: its name is no UTF-8")


def test_the_lock_is_neither_emptied_nor_followed(copy, tmp_path):
    data, precious = read("regdb", copy("regdb")), tmp_path / "precious"
    cache_images(data, (16, 8))
    (lock,) = (data.root / ".di2l_cache").glob("*.lock")
    for f in (data.root / ".di2l_cache").glob("*.np[yz]"): f.unlink()
    precious.write_text("do not empty")
    lock.unlink(), lock.symlink_to(precious)
    with pytest.raises(UserError, match="cannot be opened as a lock"): cache_images(data, (16, 8))
    assert precious.read_text() == "do not empty"


def test_digest_is_of_every_image_in_the_order_of_the_records(copy, tmp_path):
    root = copy("regdb")
    data = read("regdb", root)
    whole, held = (cache_images(d, (16, 8), tmp_path) for d in (data, hold_out(data)))
    assert whole.digest == cache_images(data, (24, 12), tmp_path).digest == pickle.loads(pickle.dumps(whole)).digest
    assert len({whole.digest, held.digest, cache_images(read_regdb(root, 2), (16, 8), tmp_path).digest}) == 2, "trials have the same images"
    file = root / data.records.path.iloc[-7]
    Image.new("RGB", (16, 32), (1, 2, 3)).save(file)
    assert cache_images(data, (16, 8), tmp_path).digest != whole.digest

