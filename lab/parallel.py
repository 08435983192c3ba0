"""Data parallelism: one run on several processes.  torchrun --nproc-per-node N run_gsm8k.py --setting ...

Every process holds both models. It writes a share of the rollouts and computes a share of the gradient. The shares are
then combined, so that all processes see the same rollouts and take the same step. The random numbers of a rollout belong
to its row (rollout.py), so it does not matter which process writes it. Only the first process writes files and prints to
stdout; all of them need a shared file system. With one process these functions return their input unchanged.

Every process needs at least one rollout of each batch and evaluation, which lab/memory.py checks. Models that are split over
several devices are not supported.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist


def start(device: str) -> str:
    """Join the other processes, if torchrun has started any. Returns the device of this one."""
    several, on_gpu = "RANK" in os.environ, device.startswith("cuda")
    if several and on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if on_gpu and ":" in device:
        torch.cuda.set_device(device)
    if several:
        dist.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(dist.destroy_process_group)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  never closed
    return device


def process_index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return process_index() == 0


def barrier() -> None:
    """Wait until every process has come this far."""
    if world_size() > 1:
        dist.barrier()


def share(items: list) -> list:
    """This process's consecutive part of a list, in parts as even as possible."""
    first, end = (len(items) * (process_index() + i) // world_size() for i in (0, 1))
    return items[first:end]


def gather(value) -> list:
    """The values of all processes, in the order of their indices."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: list[torch.nn.Parameter], loss: float) -> float:
    """Replace every gradient by its sum over the processes, and return the sum of their losses."""
    if world_size() == 1:
        return loss
    total = torch.tensor(loss, dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        # A process whose share of the micro-batches is empty has no gradient yet.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for tensor in (total, *(parameter.grad for parameter in parameters)):
        dist.all_reduce(tensor)
    return total.item()
