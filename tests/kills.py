"""Kills the large examples at random moments, or damages their checkpoints: nothing may be lost.

    python -m tests.kills --times 20    # by SIGKILL, SIGTERM, SIGINT: each training ends the same
    python -m tests.kills laboratory --times 10    # `gdmam-ldl run` by SIGKILL: the same files
    python -m tests.kills damage        # files truncated, changed, exchanged: refused, or whole

Exits with 1 where an end differs, or where a damaged checkpoint is read as another state.
"""

import argparse
import collections
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import gdmam_jax as gdmam

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "language_model": "--width 16 --layers 1 --heads 2 --batch 8 --context 8",
    "image_labels": "--hidden 16 --batch 8",
}
FLAGS = "--methods GDMAM --steps 40 --save-every 2 --print-every 40"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LABORATORY = (
    "--methods gdmam-pcgrad,rda --folds 2 --seeds 3 --epochs 200 --chunk 10 --learning-rates 1e-2 "
    "--no-report"
)


def command(name, folder):
    """The words after `python`."""
    if name == "laboratory":
        return ["-m", "gdmam_jax.ldl", "run", *LABORATORY.split(), "--out", folder]
    words = [*EXAMPLES[name].split(), *FLAGS.split(), "--checkpoints", folder]
    return [ROOT / "examples" / f"{name}.py", *words]


def run(name, folder, cache, kill_after=None, number=signal.SIGKILL):
    """What a training prints, and whether a signal after so many seconds ended it."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command(name, folder))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        return process.communicate(timeout=kill_after)[0], False
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        output = process.communicate()[0]
        return output, process.returncode != 0


def end(name, output, folder):
    """What a training leaves: the fingerprint of its state, or all of its files."""
    if name == "laboratory":
        if "all methods: nothing left" not in output:
            raise RuntimeError(f"the run did not end:\n{output}")
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): path.read_bytes() for path in files}
    found = re.findall(r"ends with state (\w+)", output)
    if not found:
        raise RuntimeError(f"the example did not end:\n{output}")
    return found[0]


def kept(name, output, folder):
    """What is there to go on from, as text, empty if nothing."""
    if name == "laboratory":
        files = [path.name == "checkpoint.npz" for path in folder.rglob("*.npz")]
        return f"{files.count(False)} results, {files.count(True)} checkpoints" if files else ""
    return "".join(f"step {step}" for step in re.findall(r"going on from step (\d+)", output))


def kill(examples, times, seed, signals):
    """How many of so many kills were not followed by the end of an undisturbed training."""
    # Where a shell started this in the background, SIGINT is ignored, and would be in the examples.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw, lost, kills, late = random.Random(seed), 0, 0, 0
    for number, example in enumerate(examples):
        share = (times + number) // len(examples)
        with tempfile.TemporaryDirectory() as home:
            cache = Path(home, "cache")
            run(example, Path(home, "first"), cache)  # compiles
            started, undisturbed = time.perf_counter(), Path(home, "undisturbed")
            expected = end(example, run(example, undisturbed, cache)[0], undisturbed)
            seconds = time.perf_counter() - started
            for attempt in itertools.count():
                folder, pending, killed = Path(home, str(attempt)), [], True
                while killed:
                    # The last run is let through; what ends before its moment is a training done.
                    moment = draw.uniform(0, seconds) if share > len(pending) else None
                    which = draw.choice(signals)
                    started = time.perf_counter()
                    output, killed = run(example, folder, cache, moment, which)
                    if killed:
                        found = kept(example, output, folder)
                        late += bool(found)
                        pending.append(f"{which.name} after {moment:.1f} s: {found or 'nothing'}")
                        print(f"{example}: {pending[-1]}", flush=True)
                if not pending:  # the machine's load may have changed
                    seconds = time.perf_counter() - started
                same = end(example, output, folder) == expected
                lost += 0 if same else len(pending)
                kills += len(pending)
                share -= len(pending)
                if pending:
                    print(f"{example}: {'the same end' if same else 'ANOTHER END'}", flush=True)
                if share <= 0:
                    break
    print(f"{kills - lost} of {kills} kills: the same bits as without, {late} after a checkpoint")
    return lost


def example_state(seed):
    draw = np.random.default_rng(seed)
    params = {
        name: np.asarray(draw.normal(size=shape), np.float32)
        for name, shape in {"v": (64, 32), "w": (64, 32), "b": 8}.items()
    }
    shapes = jax.eval_shape(gdmam.gdmam(0.1).init, params)
    state = jax.tree.map(lambda leaf: 9 * draw.uniform(size=leaf.shape), shapes)
    return jax.tree.map(
        lambda leaf, like: jax.numpy.asarray(leaf, like.dtype), (params, state), (params, shapes)
    )


def save_two(training, folder):
    """Checkpoints of steps 2 and 4."""
    arguments = argparse.Namespace(checkpoints=str(folder), save_every=2)
    with training.checkpoints("GDMAM", arguments, example_state(0)) as (_, _, save):
        for step in (2, 4):
            save(step, example_state(step), False)


def read(training, folder):
    """The step that was read and whether its state is whole; an error passes."""
    arguments = argparse.Namespace(checkpoints=str(folder), save_every=2)
    with training.checkpoints("GDMAM", arguments, example_state(0)) as (state, step, _):
        same = jax.tree.map(np.array_equal, state, example_state(step))
        return step, all(jax.tree.leaves(same))


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)


def exchange(left, right):
    spare = left.with_name("spare")
    left.rename(spare)
    right.rename(left)
    spare.rename(right)


def write_half(folder):
    """What a kill in the middle of a third save would leave."""
    half = shutil.copytree(folder / "GDMAM/4", folder / "GDMAM/6.orbax-checkpoint-tmp")
    for path in sorted(half.rglob("*"))[::2]:
        if path.is_file():
            path.unlink()


def damages(folder):
    """Everything that is done to the two checkpoints in ``folder``: (what, function of a copy)."""
    yield "a save half done", write_half
    yield (
        "folders of two steps exchanged",
        lambda at: exchange(at / "GDMAM/2", at / "GDMAM/4"),
    )
    yield (
        "arrays of two steps exchanged",
        lambda at: exchange(at / "GDMAM/2/default", at / "GDMAM/4/default"),
    )
    files = [
        path.relative_to(folder)
        for path in sorted((folder / "GDMAM/4").rglob("*"), key=lambda path: -path.stat().st_size)
        if path.is_file()
    ]
    for file in files:
        size = (folder / file).stat().st_size
        yield "a byte changed", lambda at, file=file: change_a_byte(at / file)
        for length in sorted({0, size // 2, size - 1}):
            yield "truncated", lambda at, file=file, n=length: os.truncate(at / file, n)
        yield "a file missing", lambda at, file=file: (at / file).unlink()
        other = Path(str(file).replace("/4/", "/2/"))
        if (folder / other).exists():
            yield (
                "a file of another step",
                lambda at, file=file, other=other: exchange(at / file, at / other),
            )
    data = [file for file in files if "/d/" in str(file)]
    for left, right in itertools.combinations(data, 2):
        yield (
            "two files exchanged",
            lambda at, left=left, right=right: exchange(at / left, at / right),
        )


def damage():
    """How many damaged checkpoints were read as a state that was never saved at that step."""
    sys.path.insert(0, str(ROOT / "examples"))
    import training

    counts = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder, "good"), Path(folder, "bad")
        save_two(training, good)
        for what, change in damages(good):
            shutil.rmtree(bad, ignore_errors=True)
            change(shutil.copytree(good, bad))
            # What Orbax prints of its own while it refuses.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                try:
                    verdict = "whole" if read(training, bad)[1] else "WRONG"
                except Exception:
                    verdict = "refused"
            counts[what][verdict] += 1
    for what, verdicts in counts.items():
        print(f"{what:32}", ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()))
    wrong = sum(verdicts["WRONG"] for verdicts in counts.values())
    total = sum(verdicts.total() for verdicts in counts.values())
    print(f"{total - wrong} of {total} refused, or read as the whole state that was saved")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "what", nargs="?", choices=("kills", "laboratory", "damage"), default="kills"
    )
    parser.add_argument("--times", type=int, default=20, help="how many kills (20)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals (0)")
    arguments = parser.parse_args()
    if arguments.what == "damage":
        lost = damage()
    elif arguments.what == "laboratory":
        lost = kill(["laboratory"], arguments.times, arguments.seed, [signal.SIGKILL])
    else:
        lost = kill(list(EXAMPLES), arguments.times, arguments.seed, SIGNALS)
    sys.exit(lost > 0)
