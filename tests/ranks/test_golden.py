"""Ten steps of a tiny Qwen3 against numbers kept as text.

So a change of the maths is seen even where all layouts change alike. Weights, tokens and candidate sets come from PCG64
(models.py), so the numbers depend on neither torch's nor transformers' random streams. When they are meant to change,
make the file again and say in the commit why:

    python tests/ranks/test_golden.py > tests/golden/qwen3_tiny.txt
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from jobs import Job, run
from models import QWEN3, write_folder

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "qwen3_tiny.txt"
RUNS = [("restricted", True), ("restricted", False), ("full", True), ("full", False)]
HEAD = (
    "# ten MoClip steps of a tiny Qwen3 (tests/ranks/test_golden.py): loss, head, iteration, lm loss, grad norm, "
    "angle in degrees"
)


def lines(folder: Path, loss: str, tied: bool, kernels: str = "auto") -> list[str]:
    """One line a step of the run, on one rank."""
    write_folder(folder, {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": tied})
    steps = run(Job(folder=str(folder), loss=loss, kernels=kernels)).steps
    name = f"{loss:10} {'tied' if tied else 'untied':6}"
    return [
        f"{name} {i:2} {s.loss:.8f} {s.grad_norm:.8f} {s.metrics.get('moclip/angle_mean', 0):.6f}"
        for i, s in enumerate(steps, 1)
    ]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(("loss", "tied"), RUNS, ids=str)
def test_ten_steps_as_written_down(tmp_path: Path, loss: str, tied: bool, kernels: str) -> None:
    kept = [line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    expected = [row for row in kept if row[:2] == [loss, "tied" if tied else "untied"]]
    found = [line.split() for line in lines(tmp_path, loss, tied, kernels)]
    assert len(expected) == len(found) == 10
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:3] == theirs[:3]
        assert [float(x) for x in ours[3:]] == pytest.approx([float(x) for x in theirs[3:]], rel=1e-5), (
            f"iteration {ours[2]}"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        table = [line for loss, tied in RUNS for line in lines(Path(root) / f"{loss}{tied}", loss, tied)]
    sys.stdout.write("\n".join([HEAD, *table, ""]))
