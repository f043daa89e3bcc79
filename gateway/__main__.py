"""python -m gateway: the gateway alone."""

import sys

from gateway.cli import main_gateway

sys.exit(main_gateway())
