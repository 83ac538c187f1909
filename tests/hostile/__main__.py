"""Try damaged files: ``python -m tests.hostile --cases 100000``. Exits with 1 if a reader fails at a case."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from random import Random

from tests.hostile.limits import limit_memory
from tests.hostile.readers import READERS
from tests.hostile.run import HostileFiles


def main() -> int:
    """Parse the options and try the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases in all, shared by the readers")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; the others follow")
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS), help="which ones")
    parser.add_argument("--megabytes", type=int, default=512, help="memory that the readers may take")
    options = parser.parse_args()
    failed = 0
    for name in options.readers:
        failed += try_reader(name, options.seed, options.cases // len(options.readers), options.megabytes)
    return 1 if failed else 0


def try_reader(name: str, seed: int, cases: int, megabytes: int) -> int:
    """Try the cases of one reader and say how they went; the number of those that failed."""
    files = HostileFiles(READERS[name]())
    start, read, failed = time.monotonic(), 0, 0
    with limit_memory(megabytes):
        for case in range(seed, seed + cases):
            try:
                read += files.try_case(Random(case))
            except Exception:
                failed += 1
                sys.stderr.write(f"{name}: seed {case}\n{traceback.format_exc()}\n")
    files.close()
    seconds = time.monotonic() - start
    refused = cases - read - failed
    sys.stdout.write(f"{name}: {cases} cases, {read} read, {refused} refused, {failed} failed, {seconds:.0f} s\n")
    sys.stdout.flush()
    return failed


if __name__ == "__main__":
    sys.exit(main())
