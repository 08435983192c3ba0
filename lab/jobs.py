"""All runs of a command, in one process or in several that work side by side.

Every process loads the models once and trains one run after another. Only the parent process
prints (lab/terminal.py): the others, its workers, send it what to show.
"""

import multiprocessing
import os
import signal
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager

from filelock import FileLock, Timeout

from lab import runs, terminal


def run_all(train: Callable[[Namespace], None], todo: list[Namespace]) -> None:
    """Train every run that is not finished, --jobs at a time."""
    with locked(todo):
        left = [args for args in todo if not runs.is_finished(args)]
        if not left:
            return
        jobs = min(left[0].jobs, len(left))
        terminal.announce(left, jobs)
        try:
            if jobs > 1:
                run_side_by_side(train, left, jobs)
            else:
                for args in left:
                    run_one(train, args)
        finally:
            terminal.draw("")


@contextmanager
def locked(todo: list[Namespace]) -> Iterator[None]:
    """Lock and check the folder of every run, before anything long. Locks die with the process."""
    with ExitStack() as locks:
        for args in todo:
            folder = runs.run_folder(args)
            try:
                locks.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout as error:
                remedy = "wait until it has ended, or choose another --out"
                raise runs.Refused(f"{folder} is written by another process: {remedy}") from error
            except OSError as error:
                # Each run holds its lock file open, and too many files may be open.
                remedy = "choose another --out, ask for fewer --seeds, or raise `ulimit -n`"
                raise runs.Refused(f"cannot lock {folder} ({error}): {remedy}") from error
            runs.check_folder(args)
        yield


def run_one(train: Callable[[Namespace], None], args: Namespace) -> None:
    """Train a run to its end. If it diverges, stopped.txt says why, and the other runs go on."""
    try:
        train(args)
    except (runs.Diverged, FloatingPointError) as error:
        path = runs.run_folder(args) / "stopped.txt"
        runs.replace_file(path, f"{path.parent}: {error}\n".encode())
    name, why = terminal.name_of(args), runs.why_it_diverged(args)
    terminal.show(name, args.updates, args.updates, line=why)


def run_side_by_side(train: Callable[[Namespace], None], left: list[Namespace], jobs: int) -> None:
    # Spawned: a fork of a process whose OpenMP threads have started can wait forever.
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    workers = ProcessPoolExecutor(jobs, context, start_worker, [messages])
    try:
        unfinished = {workers.submit(run_one, train, args) for args in left}
        while unfinished:
            finished, unfinished = wait(unfinished, timeout=0.2)
            while not messages.empty():
                terminal.show(*messages.get())
            for future in finished:
                future.result()  # raises the error of the run, if there is one
    except BrokenProcessPool as error:
        remedy = "continue with --resume and fewer --jobs"
        raise runs.Refused(f"a process was killed, perhaps for want of memory: {remedy}") from error
    finally:
        # After Ctrl-C or an error no run goes on, because every run can be resumed.
        for worker in multiprocessing.active_children():
            worker.terminate()
        workers.shutdown(cancel_futures=True)


def start_worker(messages) -> None:
    """Send messages to the parent, leave Ctrl-C to it, and die with it."""
    terminal.parent = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
