"""For all tests: torch's threads wait as they do in the worker, since tests run beside servers on the same cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
