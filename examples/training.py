"""What the two large examples share: methods, flags, and one training loop for many devices.

Copy it with them. One mesh axis, "data", runs over all devices of all processes. Batches are always
split over it (data parallelism); with --fsdp parameters and optimizer state are, too.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gdmam_jax as gdmam

BASELINE = "summed loss"
NOT_THE_TRAINING = {
    *("methods", "print_every", "save_every", "checkpoints", "fsdp", "wait"),
    *("distributed", "coordinator", "num_processes", "process_id"),
}
"""Flags that may differ when a training goes on."""
METHODS = {
    "prediction alone": lambda rate: gdmam.summed(optax.adamw(rate), alignment_weight=0.0),
    BASELINE: lambda rate: gdmam.summed(optax.adamw(rate)),
    "GDMAM": lambda rate: gdmam.gdmam(rate),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that do not depend on the example."""
    parser.add_argument("--seed", type=int, default=0, help="of parameters and batches (0)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--print-every", type=int, default=100, help="steps between metrics (100)")
    scale = parser.add_argument_group("scale")
    scale.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    scale.add_argument(
        "--fsdp", action="store_true", help="shard parameters and optimizer state over all devices"
    )
    scale.add_argument(
        "--checkpoints",
        help="folder or gs:// address to save in, and to resume from",
    )
    scale.add_argument("--save-every", type=int, default=100, help="steps between two (100)")
    scale.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes that SLURM, Open MPI or the TPU slice started",
    )
    scale.add_argument("--coordinator", help="host:port of process 0, if not detected")
    scale.add_argument("--num-processes", type=int, help="how many there are")
    scale.add_argument("--process-id", type=int, help="which one this is, from 0")
    scale.add_argument(
        "--wait", type=int, default=300, help="seconds to wait for all processes (300)"
    )


def start(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Mesh]:
    """Reads the flags and joins the other processes, if any. Call it before any use of JAX."""
    arguments = parser.parse_args()
    if arguments.distributed or arguments.coordinator:
        # If one is missing, JAX aborts with a stack trace. Be first, with a clear message.
        watch = threading.Timer(arguments.wait, give_up, [arguments])
        watch.start()
        try:
            jax.distributed.initialize(
                arguments.coordinator,
                arguments.num_processes,
                arguments.process_id,
                initialization_timeout=arguments.wait + 60,
            )
        finally:
            watch.cancel()
    elif arguments.num_processes is not None or arguments.process_id is not None:
        parser.error("--num-processes and --process-id need --coordinator or --distributed")
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sizes = ("width", "hidden", "layers", "heads", "context")  # Each example has some of them.
    for flag in ("steps", "batch", "print_every", "save_every", *sizes):
        if getattr(arguments, flag, 1) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    if arguments.seed < 0:
        parser.error("--seed must be at least 0")
    size = "width" if hasattr(arguments, "width") else "hidden"
    if getattr(arguments, "encoder", "vit") == "vit" and getattr(arguments, size) % arguments.heads:
        parser.error(f"--heads must divide --{size}")
    if arguments.batch % mesh.size:
        parser.error(f"--batch {arguments.batch} does not divide over {mesh.size} devices")
    return arguments, mesh


def give_up(arguments):
    """Ends this process, which is waiting for others."""
    me = "A process"
    if arguments.num_processes is not None:
        me = f"Process {arguments.process_id} of {arguments.num_processes}"
    where = arguments.coordinator or "the coordinator"
    sys.stderr.write(
        f"{me}: not all processes met at {where} within "
        f"{arguments.wait} s. Was each of them started, with a --process-id of its own and the "
        "same --num-processes, and can each reach that address?\n"
    )
    sys.stderr.flush()
    os._exit(1)


def sharding(mesh, leaf, fsdp):
    """Over the largest dimension that the devices divide evenly; if none, a copy on each."""
    for axis in sorted(range(leaf.ndim), key=lambda axis: -leaf.shape[axis]) if fsdp else ():
        if leaf.shape[axis] % mesh.size == 0:
            return NamedSharding(mesh, P(*[None] * axis, "data"))
    return NamedSharding(mesh, P())


def create(make_state, mesh, fsdp):
    """``make_state()``, compiled so that each device makes its own part and none holds it all."""
    shapes = jax.eval_shape(make_state)
    shardings = jax.tree.map(lambda leaf: sharding(mesh, leaf, fsdp), shapes)
    return jax.jit(make_state, out_shardings=shardings)()


def split_batch(batch, mesh):
    """Splits a batch that every process has made alike: each device gets its part."""
    rows = NamedSharding(mesh, P("data"))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, rows, lambda part: leaf[part]), batch
    )


@contextlib.contextmanager
def checkpoints(name, arguments, state):
    """Gives the latest saved state called ``name``, its step, and a function that saves the next.

    The function saves every so many steps, and the last. It does not matter how many devices or
    processes saved a state, or whether with --fsdp: each array comes back with the sharding that it
    has in ``state``.
    """
    if arguments.checkpoints is None:
        yield state, 0, lambda step, state, last: None
        return
    flags = {flag: x for flag, x in vars(arguments).items() if flag not in NOT_THE_TRAINING}
    options = ocp.CheckpointManagerOptions(save_interval_steps=arguments.save_every, max_to_keep=2)
    folder = f"{arguments.checkpoints}/{name.replace(',', '').replace(' ', '-')}"
    folder = folder if "://" in folder else os.path.abspath(folder)
    with ocp.CheckpointManager(folder, options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            report(f"{name}: going on from step {first}")
            saved = manager.metadata(first).custom_metadata or {}
            before = saved.pop("flags", flags)
            if before != flags:
                other = [f"{flag}={x}" for flag, x in before.items() if flags.get(flag) != x]
                raise ValueError(
                    f"{folder} is of a training with {', '.join(other)}; give the same flags, or "
                    "another --checkpoints"
                )
            state = manager.restore(first, args=ocp.args.StandardRestore(state))
            if saved != {"step": first, "fingerprint": fingerprint(state)}:
                raise ValueError(
                    f"{folder}/{first} is not what was saved at step {first}: a damaged or "
                    "exchanged file; remove that folder to go on from the checkpoint before"
                )

        def save(step, state, last):
            if last or manager.should_save(step):
                proof = {"step": step, "fingerprint": fingerprint(state), "flags": flags}
                manager.save(
                    step, args=ocp.args.StandardSave(state), force=last, custom_metadata=proof
                )

        yield state, first, save


def fit(name, arguments, mesh, state, step, draw_batch):
    """Trains from the last checkpoint, or from the start. Returns the last state and all cosines.

    Args:
      name: of the method, for what is printed and saved.
      arguments: the flags.
      mesh: the devices.
      state: what the training starts from.
      step: compiled; from a state and a batch to the next state and metrics.
      draw_batch: a function of the step's number, so that an interrupted training goes on as if it
        had never stopped; the same on all processes.
    """
    cosines, started = [], time.perf_counter()
    with checkpoints(name, arguments, state) as (state, first, save):
        for number in range(first, arguments.steps):
            state, metrics = step(state, split_batch(draw_batch(number), mesh))
            save(number + 1, state, number + 1 == arguments.steps)
            cosines.append(metrics["cosine"])
            if (number + 1) % arguments.print_every == 0 or number + 1 == arguments.steps:
                now = ", ".join(f"{key} {float(value):.3f}" for key, value in metrics.items())
                speed = (number + 1 - first) / (time.perf_counter() - started)
                report(f"{name}: step {number + 1}/{arguments.steps}, {now}, {speed:.2f} steps/s")
    print(
        f"{name}: process {jax.process_index()} of {jax.process_count()} ends with state "
        f"{fingerprint(state)}",
        flush=True,
    )
    return state, np.array([float(cosine) for cosine in cosines])


def report(text):
    """Prints once, however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def fingerprint(tree):
    """A hash of all numbers: any changed bit changes it, another sharding does not."""
    sums = np.array(jax.device_get(checksums(jax.tree.leaves(tree))))
    return hashlib.sha256(sums.tobytes()).hexdigest()[:16]


@jax.jit
def checksums(arrays):
    """For each array, the sum of its bits as integers times odd positions, without rounding."""

    def checksum(array):
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
        position = jnp.uint32(0)
        for axis, size in enumerate(array.shape):
            position = position * size + jax.lax.broadcasted_iota("uint32", array.shape, axis)
        return jnp.sum(bits.astype("uint32") * (2 * position + 1), dtype="uint32")

    return [checksum(array) for array in arrays]


def conclude(results, cosines):
    """What came out, in plain words.

    Args:
      results: the method's (prediction, alignment) loss on unseen data, lower is better.
      cosines: the method's cosine of the two gradients at each step of this run.
    """
    report("On unseen data (lower is better):")
    for name, losses in results.items():
        report(f"  {name:16}  prediction {losses[0]:.4f}  alignment {losses[1]:.4f}")
    for name, values in cosines.items():
        if len(values):
            late = values[len(values) // 2 :]
            report(
                f"{name}: in the second half the gradients opposed each other in "
                f"{np.mean(late < 0):.0%} of the steps, mean cosine {late.mean():+.2f}."
            )
    for name in results:
        if name.startswith("GDMAM") and BASELINE in results:
            changes = [
                100 * (mine / baseline - 1)
                for mine, baseline in zip(results[name], results[BASELINE], strict=True)
            ]
            words = [
                "better" if change < -1 else "worse" if change > 1 else "about equal"
                for change in changes
            ]
            report(
                f"{name} against the summed loss: prediction {words[0]} ({changes[0]:+.1f}%), "
                f"alignment {words[1]} ({changes[1]:+.1f}%)."
            )
    report("One seed, one learning rate for all: try others before you believe it.")
