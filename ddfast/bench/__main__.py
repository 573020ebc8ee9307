"""`python -m ddfast.bench`, the same as `ddfast bench`."""

import sys

from ddfast.bench.command import run

if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, ImportError, OSError) as error:
        print(f"ddfast bench: error: {error}", file=sys.stderr)
        sys.exit(2)
