"""Write the demo's NL2SQL task into a folder: `python examples/nl2sql/make_task.py task --train 600 --test 120`."""

from __future__ import annotations

import argparse

from megatron_replay.demo.task import make_task

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--train", type=int, default=600, help="examples on the four training databases")
    parser.add_argument("--test", type=int, default=120, help="examples on the two held-out databases")
    print(make_task(**vars(parser.parse_args())))
