"""Notes where it is imported: in a zygote, which has no function to run yet, or in a sandbox."""

import os
import sys

PID = os.getpid()
EARLIER = "tests.integration.compute_functions" not in sys.modules
