"""Replace, unload and switch the adapters of ``OnnxAdapters`` while other threads run them, for a minute.

    python -m benchmarks.serving_stress --seconds 60 --threads 4

Exits with 0 if every answer was that of the old or the new adapter. tests/serving runs the same for seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.serving.models import write_files
from tests.serving.stress import stress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=4, help="threads that run adapters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = stress(write_files(Path(folder)), seconds=options.seconds, threads=options.threads)
    answers = sum(counts.runs.values())
    print(f"{answers:,} answers, {counts.changes:,} changes, {counts.absent:,} calls while the adapter was not loaded")
    print(f"{len(counts.wrong)} wrong answers, errors: {counts.errors or 'none'}")
    raise SystemExit(bool(counts.wrong or counts.errors))


if __name__ == "__main__":
    main()
