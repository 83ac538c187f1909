"""How often the role found in the graph is the one that a weight's name gives, over the architectures of the zoo.

    python benchmarks/role_accuracy.py                      # every architecture, a table at the end
    python benchmarks/role_accuracy.py --names bert,llama   # some

Names are read by tests/zoo/role_names.py only; the roles themselves never see one. Weights whose names say
nothing definite are counted apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo import entries  # noqa: E402
from tests.zoo.role_checks import RoleScore, score_roles  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", help="architectures, separated by commas (default: all)")
    parser.add_argument("--show", action="store_true", help="list the role of every weight, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores: list[RoleScore] = []
    for entry in entries(names=options.names.split(",") if options.names else None):
        if entry.group == "awkward":
            continue
        score = score_roles(entry)
        scores.append(score)
        print(f"{score.name:24} {score.right:4} of {score.known:4}   names silent on {score.silent}", flush=True)
        for name, (found, expected) in score.wrong.items():
            print(f"    {name}: {found}, named {expected}")
        if options.show:
            print("\n".join(f"    {name:64} {role}" for name, role in score.roles.items()))
    right, known = sum(s.right for s in scores), sum(s.known for s in scores)
    whole = sum(s.right == s.known for s in scores)
    print(
        f"{right} of {known} weights right ({right / max(1, known):.2%}) on {len(scores)} architectures, "
        f"all of them on {whole}; {sum(s.silent for s in scores)} weights have names that do not say"
    )


if __name__ == "__main__":
    main()
