"""How fast jaxbatch is, side by side with what a user would use instead, in one run on one machine.

    python scripts/bench.py train       a training step of SimpleCNN by batch size, against PyTorch eager
    python scripts/bench.py updates     an update of SimpleCNN by batch size, from 1 to 65,536
    python scripts/bench.py split       K updates from one batch, against a plain step and PyTorch's ways; also with the parameters as one vector
    python scripts/bench.py gradients   a gradient for each example, against torch.func and opacus
    python scripts/bench.py coupled     a contrastive loss and a softmax over many classes in parts, against whole
    python scripts/bench.py layers      convolutions one by one, against XLA's own and PyTorch's
    python scripts/bench.py adabatch    steps of AlexNet, ResNet-20 and VGG19_BN, against PyTorch eager
    python scripts/bench.py language    steps of a transformer and a gradient for each sequence, against PyTorch eager and torch.func
    python scripts/bench.py noise       a step whose noise is measured, against one without
    python scripts/bench.py huge        steps of 100,000 and 1,000,000 images in microbatches, against the microbatch's own steps
    python scripts/bench.py sweep       32 runs in one program, against one after another
    python scripts/bench.py ladder      what a change of batch size costs
    python scripts/bench.py target      SimpleCNN to 98% on MNIST
    python scripts/bench.py startup     importing, --help, a first and a second run
    python scripts/bench.py before --checkout DIR    the same steps by an earlier checkout, in the same rounds; --quick: fewer of both

PyTorch and opacus are timed where they are installed: pip install -e '.[bench]'. On a GPU both sides use it.
"""

import json
import math
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed
os.environ.setdefault("PYTHONPATH", sys.path[0])  # for the processes that it starts

from experiments.harness.environment import settle

if __name__ == "__main__":
    settle()

from typing import Annotated

import tyro
from bench_commands import Command
from rich.console import Console
from side_by_side import report

from experiments.harness.command_line import one_line_errors


def finite(row: dict) -> dict:
    """The row with null in place of NaN, such as the interval of a single round, because JSON has no NaN."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def main() -> None:
    """The command line."""
    config = tyro.cli(Annotated[Command, tyro.conf.OmitSubcommandPrefixes], description=__doc__)
    with one_line_errors():
        rows = config.run()
        report(rows, Console(highlight=False, width=150))
        if config.json:
            pathlib.Path(config.json).write_text("".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
