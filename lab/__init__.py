"""Everything around the algorithm: problems, models, the specialist, the tiny base, run folders, memory, figures, benchmark.

Import this package before torch. By default, idle OpenMP threads spin. If another program occupies a core, the remaining
threads waste most of their time spinning. The passive policy lets them sleep, which costs little on a quiet machine. An
OMP_WAIT_POLICY that is already in the environment is kept.
"""

import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On a CPU, bitsandbytes recommends an optional package of kernels at every start. It is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
