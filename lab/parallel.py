"""Several processes: one per run on the cores of a CPU (--jobs), or all for one run on several GPUs (torchrun).

Side by side: a model as small as the tiny pair gains hardly anything from a second thread, so on a CPU each run gets a
process with a single thread, and several runs are made at the same time. The files of a run do not depend on it.

Data parallelism: torchrun --nproc-per-node N run_gsm8k.py --setting ... Every process holds both models. It writes a share
of the rollouts and computes a share of the gradient. The shares are then combined, so that all processes see the same
rollouts and take the same step. The random numbers of a rollout belong to its row (rollout.py), so it does not matter which
process writes it. Only the first process writes files and prints to stdout; all of them need a shared file system. With one
process these functions return their input unchanged.

Every process needs at least one rollout of each batch and evaluation, which lab/memory.py checks. Models that are split over
several devices are not supported.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Runs side by side


def for_each(function: Callable, items: list, jobs: int) -> Iterator:
    """Yield function(item) for every item: in this process, or in `jobs` processes and in the order in which they finish.

    Raises BrokenProcessPool if a process was killed, for instance for want of memory.
    """
    if jobs == 1:
        yield from map(function, items)
        return
    # Spawned rather than forked: a fork of a process whose OpenMP threads have started can wait for them forever.
    context = multiprocessing.get_context("spawn")
    lines = context.SimpleQueue()
    for line in range(jobs):
        lines.put(line)
    with ProcessPoolExecutor(jobs, context, _start_worker, (context.RLock(), lines)) as workers:
        for future in as_completed([workers.submit(function, item) for item in items]):
            yield future.result()


# The line of the terminal on which this process draws its progress bar.
_line = 0


def _start_worker(lock, lines) -> None:
    global _line
    _line = lines.get()
    tqdm.set_lock(lock)
    # A run may be interrupted at any moment (lab/runs.py), so Ctrl-C, or the end of the parent process, ends it at once.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def begin_run() -> None:
    """From here on, a process of --jobs has a single thread.

    Before that, while the specialist of its first run is made, it may use all cores: the other processes wait for the
    same specialist.
    """
    if multiprocessing.parent_process():
        torch.set_num_threads(1)


def progress(items, label: str, unit: str) -> Iterator:
    """tqdm's progress bar over the items, in the first process of a run only."""
    return tqdm(items, desc=label, unit=unit, position=_line, disable=not is_main())


# ----------------------------------------------------------------------------------------------------------------------
# Data parallelism


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
