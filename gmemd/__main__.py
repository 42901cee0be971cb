# SPDX-License-Identifier: Apache-2.0
"""`python -m gmemd` is `gmemd`."""

import sys

from gmemd.cli import main_gmemd

sys.exit(main_gmemd())
