"""``python -m normzoo_bench`` is ``normzoo bench``."""

import argparse
import sys

from .commands import bench, bench_arguments


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m normzoo_bench", description="Measures the layers.")
    bench_arguments(parser)
    return bench(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
