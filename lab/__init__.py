"""Everything around the algorithm: settings, speed, problems, models, run folders, figures.

Import this package before torch. By default, idle OpenMP threads spin for long. If another program
occupies a core, the remaining threads waste most of their time spinning. A short spin before they
sleep costs little on a quiet machine and keeps a busy one at about twice the time. What the
environment already sets is kept.
"""

import logging
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# On a CPU, bitsandbytes recommends an optional package of kernels at every start. It is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
