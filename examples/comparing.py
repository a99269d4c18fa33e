"""What the examples in other libraries share: the error on Burgers' equation, and a table."""

import argparse
import time

import numpy as np
from burgers import exact


def relative_error(predict, end=1.0):
    """The error of ``predict(x, t)``, vectors in and out, against the exact solution up to end."""
    x, t = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, end, 101), indexing="ij")
    expected = exact(np.stack([x.ravel(), t.ravel()], axis=1)).ravel()
    found = np.asarray(predict(np.float32(x.ravel()), np.float32(t.ravel()))).ravel()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def compare(description, methods, error, steps):
    """Reads the flags, and prints the errors that ``error(method, seed, steps, rate)`` returns."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=steps, help=f"steps of a training ({steps})")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="initial rate (1e-2)")
    parser.add_argument("--seeds", type=int, default=1, help="networks per method (1), from seed 0")
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    print(f"{'relative error':20}", *(f"{word:>12}" for word in ("median", "lowest", "highest")))
    for name in arguments.methods:
        began = time.process_time()
        errors = [
            error(name, seed, arguments.steps, arguments.learning_rate)
            for seed in range(arguments.seeds)
        ]
        found = (np.median(errors), min(errors), max(errors))
        seconds = (time.process_time() - began) / arguments.seeds
        print(f"{name:20}", *(f"{number:12.4f}" for number in found), f"   {seconds:.0f} s each")
