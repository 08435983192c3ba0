"""What the experiments stand on: problems, models, the specialist, the tiny base, run folders, memory, figures, benchmark.

Import this package before torch. By default, OpenMP threads wait for each other in a busy loop. If another program takes a
core, they lose most of their time in it. With the passive policy they sleep instead, which costs little on a quiet
machine. An OMP_WAIT_POLICY that is already in the environment is kept.
"""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On a CPU, bitsandbytes recommends an optional package of kernels at every start. It is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
