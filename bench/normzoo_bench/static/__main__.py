"""``python -m normzoo_bench.static``: :mod:`.command`, where there is Triton to compile with."""

import sys

from normzoo_bench.environment import demand_triton


def main() -> int:
    """Returns 0 if every gate holds, 1 if one falls, 2 for wrong usage or without Triton."""
    try:
        demand_triton()
    except ValueError as error:
        print(f"python -m normzoo_bench.static: {error}", file=sys.stderr)
        return 2
    from .command import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
