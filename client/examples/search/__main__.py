# SPDX-License-Identifier: Apache-2.0
"""Semantic search over the docstrings of Python's standard library, with a transformer that doesn't fit its device.

Run as `python client/examples/search`. Exit status: 0 when every check held, 1 when one failed, 2 for bad arguments.
"""

import argparse
import os
import sys
from pathlib import Path


def positive(value: str) -> int:
    number = int(value)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="search", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--hbm", default="48M", metavar="SIZE", help="memory of the simulated device (default: 48M)")
    add("--query", action="append", default=[], metavar="TEXT", help="ask this as well; may be repeated")
    add("--hits", type=positive, default=5, metavar="N", help="answers to each query (default: 5)")
    add("--texts", type=positive, default=4000, metavar="N", help="docstrings to take (default: 4000)")
    add("--batch", type=positive, default=512, metavar="N", help="most texts in a batch (default: 512)")
    add("--batch-tokens", type=positive, default=8192, metavar="N", help="most tokens in a batch (default: 8192)")
    add("--sample", type=positive, default=600, metavar="N", help="texts to verify, at least (default: 600)")
    add("--threads", type=positive, default=2, metavar="N", help="BLAS threads, host and device (default: 2)")
    add("--out", type=Path, default=Path("build/run"), metavar="DIR", help="for report.json and pagemap.png")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Read when NumPy is loaded, here and in the device context, which inherits them.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(arguments.threads)
    try:
        import run
    except ModuleNotFoundError as error:
        print(f"search: {error.name} is not installed: pip install 'gmem[demo]', or use make run", file=sys.stderr)
        return 1
    try:
        failures = run.run(arguments)
    except KeyboardInterrupt:
        print("search: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        failures = [f"{type(error).__name__}: {error}"]
        if os.environ.get("GMEM_DEBUG"):
            raise
    for failure in failures:
        print(f"search: FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
