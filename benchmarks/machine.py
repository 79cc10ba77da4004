"What the numbers of a benchmark may depend on."
import os
import platform
from pathlib import Path

import torch

from di2l.files import versions


def machine():
    "Processor, cores, threads and versions, for the record."
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return dict(processor=names[0] if names else platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                bf16=torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False, versions=versions())
