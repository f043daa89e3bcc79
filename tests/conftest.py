"""For all tests: torch's threads wait for each other as in the worker, since tests run beside servers."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
