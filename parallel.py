"""Several processes, one run:  torchrun --nproc-per-node N run_gsm8k.py --setting ...

Each process holds the models, writes a share of the rollouts and computes a share of the gradient; the shares are put
together, so that every process sees the same rollouts and makes the same step. With one process nothing here does
anything. Which process writes which row changes nothing: its random numbers belong to the row (rollout.py).

Not here: models that are cut over several devices.
"""

import atexit
import os
import shutil
import sys
import tempfile

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Join the other processes, if torchrun started any. Returns the device of this one."""
    several, on_gpu = "RANK" in os.environ, device.startswith("cuda")
    if several and on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if on_gpu and ":" in device:
        torch.cuda.set_device(device)
    if several:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one of them speaks, for all its life
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_folder(folder: str) -> str:
    """Where this process writes: the first one in `folder`, the others in copies that are thrown away.

    So each decides alike what there is to do, and none is in another's way. All must see the same `folder`.
    """
    if world() == 1:
        return folder
    if rank() > 0:
        scratch = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, scratch)
        if os.path.isdir(folder):
            shutil.copytree(folder, scratch, dirs_exist_ok=True)
        folder = scratch
    dist.barrier()  # the first one waits until the others have their copies
    return folder


def share(things: list) -> list:
    """This process's consecutive part of a list, as even as can be."""
    start, end = (len(things) * (rank() + i) // world() for i in (0, 1))
    return things[start:end]


def gather(thing) -> list:
    """What every process has, in the order of their ranks."""
    if world() == 1:
        return [thing]
    things = [None] * world()
    dist.all_gather_object(things, thing)
    return things


def add_up(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    for tensor in tensors if world() > 1 else []:
        dist.all_reduce(tensor)


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
