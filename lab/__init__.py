"""What the experiments stand on: problems, models, the specialist, the tiny base, run folders, memory, figures, benchmark.

Import this package before torch. OpenMP threads that wait for each other in a busy loop, its default, lose most of their
time on a machine on which another program takes a core. With the passive policy they sleep instead. On a quiet machine
that costs little, and OMP_WAIT_POLICY in the environment still decides.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
