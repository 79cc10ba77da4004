"Two processes that train together, and one that trains alone: what each has computed after some steps."
import multiprocessing, os, socket

import torch

FRESH = multiprocessing.get_context("spawn")


def _as_rank(rank, world, port, work, args, file):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = work(*args)
    if rank == 0: torch.save(found, file)


def by_processes(world, folder, work, *args):
    "What `work(*args)`, a function of a module's top level, returns in the first of `world` new processes."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    file = folder / f"{world}.pt"
    ranks = [FRESH.Process(target=_as_rank, args=(r, world, port, work, args, file), daemon=True) for r in range(world)]
    for p in ranks: p.start()
    for p in ranks: p.join(500)
    assert [p.exitcode for p in ranks] == [0] * world
    return torch.load(file, weights_only=False)
