"Shared by all tests: one thread, a deterministic hypothesis profile, and where the official SYSU-MM01 protocol files are."
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: bits of runs are compared between processes, and sums depend on the number of threads

import pytest
from hypothesis import settings

import standins

settings.register_profile("di2l", derandomize=True, deadline=None, database=None)
settings.load_profile("di2l")


@pytest.fixture(scope="session")
def sysu_protocol_files():
    "Folder of the official protocol (`rand_perm_cam.mat`, …): `DI2L_SYSU_PROTOCOL`, or `shared/sysu_mm01` beside the checkout."
    beside = Path(__file__).resolve().parents[2] / "shared" / "sysu_mm01"
    folder = Path(os.environ.get("DI2L_SYSU_PROTOCOL", beside))
    if not (folder / "rand_perm_cam.mat").exists():
        pytest.skip("SYSU-MM01's official rand_perm_cam.mat is not here; point DI2L_SYSU_PROTOCOL at its folder")
    return folder


@pytest.fixture(autouse=True)
def ordinary_floats():
    "Training flushes denormal numbers to zero; no test leaves the processor in that mode."
    yield
    import torch

    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def scratch():
    "Thousands of small files: in memory where there is a gigabyte for them, so that a busy disk does not slow the suite."
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1e9
    with tempfile.TemporaryDirectory(dir=memory if roomy else None, prefix="di2l-test-") as folder: yield Path(folder)


@pytest.fixture(scope="session")
def bases(scratch):
    "One small stand-in of each dataset, never written to again."
    made = {name: standins.write_standin(name, scratch / "bases" / name, **kw) for name, kw in standins.BASES.items()}
    for file in made["sysu"].glob("cam*/*/*.jpg"):
        if int(file.stem) > 11: file.unlink()
    return made


@pytest.fixture
def copy(bases, scratch):
    "A stand-in that a test may damage."
    folder = Path(tempfile.mkdtemp(dir=scratch))
    yield lambda name: Path(shutil.copytree(bases[name], folder / name))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def true_scale(scratch):
    "SYSU-MM01's counts to the image."
    beside = Path(__file__).resolve().parents[2] / "shared" / "sysu_mm01"
    file = Path(os.environ.get("DI2L_SYSU_PROTOCOL", beside)) / "rand_perm_cam.mat"
    return standins.write_standin("sysu", scratch / "true", file if file.exists() else None, size=(16, 8))
