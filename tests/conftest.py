"Shared by all tests: one thread, a deterministic hypothesis profile, and where the official SYSU-MM01 protocol files are."
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # before torch: bits of runs are compared between processes, and sums depend on the number of threads

import pytest
from hypothesis import settings

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
