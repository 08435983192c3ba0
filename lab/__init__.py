"""Everything around the algorithm: settings, speed, problems, models, run folders, figures.

Import this package before torch, for which it sets two variables of the environment; what is set
already is kept. By default, idle OpenMP threads spin for long. If another program occupies a core,
the remaining threads waste most of their time spinning. A short spin before they sleep costs little
on a quiet machine and keeps a busy one at about twice the time. And oneDNN, which multiplies
matrices in bfloat16 on a CPU, keeps what it has prepared for the last 1,024 shapes. Every batch has
new ones, so that a run would take up more memory with every update.
"""

import logging
import multiprocessing
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
if os.isatty(2) and multiprocessing.parent_process() is None:
    # What is printed next goes over it.
    print("Loading torch, transformers and peft ...", end="\r", file=sys.stderr, flush=True)
# On a CPU, bitsandbytes recommends an optional package of kernels at every start. It is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# A run that was killed may have left half a README.md beside its adapter, which is written again.
logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)


def _print_error(kind, error, traceback) -> None:
    """As ever, but one line if Ctrl-C interrupts the imports of libraries, which take seconds."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, traceback)
    elif multiprocessing.current_process().name == "MainProcess":
        print("interrupted", file=sys.stderr)


sys.excepthook = _print_error
