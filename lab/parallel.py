"""Several processes, one run:  torchrun --nproc-per-node N run_gsm8k.py --setting ...

Every process holds both models. It writes a share of the rollouts and computes a share of the gradient. The shares are
then combined, so that all processes see the same rollouts and take the same step. The random numbers of a rollout belong
to its row (rollout.py), so it does not matter which process writes it. Only the first process writes files and prints;
the others must see the same folders. With one process, every function here does nothing.

Models that are split over several devices are not supported.
"""

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
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as this process lives
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come this far."""
    if world_size() > 1:
        dist.barrier()


def share(items: list) -> list:
    """This process's consecutive part of a list, in parts as even as possible."""
    start, end = (len(items) * (rank() + i) // world_size() for i in (0, 1))
    return items[start:end]


def gather(thing) -> list:
    """What every process has, in the order of their ranks."""
    if world_size() == 1:
        return [thing]
    things = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def sum_gradients(parameters: list[torch.nn.Parameter], loss: float) -> float:
    """Replace every gradient by its sum over the processes, and return the sum of their losses."""
    if world_size() == 1:
        return loss
    total = torch.tensor(loss, dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        # A process whose share of the micro-batches is empty has no gradient yet.
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for tensor in (total, *(parameter.grad for parameter in parameters)):
        dist.all_reduce(tensor)
    return total.item()


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
