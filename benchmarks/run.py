"""One entry for the benchmarks: the table's name, then its own options.

python benchmarks/run.py loss --output benchmarks/results/loss.csv
python benchmarks/run.py topk --output benchmarks/results/topk.csv
python benchmarks/run.py optimizers --help
"""

from __future__ import annotations

import importlib
import sys

TABLES = ("loss", "logits", "topk", "optimizers", "store", "prefix", "imbalance", "step", "scale", "memory")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python benchmarks/run.py {{{'|'.join(TABLES)}}} [options]")
    name = sys.argv.pop(1)
    sys.argv[0] = f"benchmarks/{name}.py"
    importlib.import_module(name).main()


if __name__ == "__main__":
    main()
