"""Small mistakes made on purpose, each with the tests that must notice it.

    python -m tests.mutants                # the mistakes of the list below
    python -m tests.mutants --random 60    # as many drawn from all that the syntax allows

Copies the project to a temporary folder, makes one mistake at a time, and runs the named tests: a
mutant survives where they all pass. Exits with 1 if one does, or if a mistake no longer fits the
code. A few seconds each; `-k` chooses some by a part of their description.
"""

import argparse
import ast
import contextlib
import copy as copying
import dataclasses
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake: what of which module becomes what, and which tests notice."""

    what: str
    module: str
    old: str
    new: str
    tests: str


SCOPES = "tests/test_geometry.py -k scope"
PROGRAM = "ldl/laboratory/program"
NUMBERS = "tests/ldl/test_experiment.py -k numpy_finds"
SHORT = "tests/ldl/test_experiment.py -k by_hand"
MUTANTS = (
    Mutant(
        "several alignment losses together outvote the prediction", "_gates",
        "jnp.where(opposing > agreeing, divide(agreeing, opposing), 1)", "1",
        "tests/test_allocation.py -k several_losses",
    ),
    Mutant(
        "a nearly parallel scope's orthogonal norm comes from the inner products",
        "_geometry", "geometry = dataclasses.replace(geometry, orthogonal_norm=lengths)", "",
        SCOPES,
    ),
    Mutant(
        "inner products that nobody asks for are taken all the same", "_geometry",
        "return [needed, others] if len(others) > 1 else [needed + others]",
        "return [needed + others]",
        "tests/test_geometry.py -k large_gradients",
    ),
    Mutant(
        "every leaf goes by the first scope", "_scopes",
        "return scalars[self.index[leaf]] if self.index", "return scalars[0] if self.index",
        "tests/compatibility/test_scopes.py -k alone",
    ),
    Mutant(
        "all scopes share one sum", "_scopes",
        "groups[self.index[position] if self.index else 0]", "groups[0]", SCOPES,
    ),
    Mutant(
        "a norm that is no number counts as none", "_numerics",
        "zero = x <= 0", "zero = ~(x > 0)",
        "tests/test_geometry.py -k too_long",
    ),
    Mutant(
        "the gradient of a root at 0 is infinite", "_numerics",
        "return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))", "return jnp.sqrt(x)",
        "tests/test_transform.py -k zero_gradients",
    ),
    Mutant(
        "float16 parts become infinite", "_numerics",
        "return jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit)).astype(dtype)",
        "return x.astype(dtype)",
        "tests/test_geometry.py -k float16_is_cut",
    ),
    Mutant(
        "float16 sums become infinite", "_allocation",
        "return narrow(sum(terms[1:], terms[0]), jnp.result_type(pair.prediction))",
        "return sum(terms[1:], terms[0]).astype(jnp.result_type(pair.prediction))",
        "tests/test_optimizers.py -k cut",
    ),
    Mutant(
        "float16 updates become infinite", "_transform",
        "return narrow(direction, dtype), stored", "return direction.astype(dtype), stored",
        "tests/test_transform.py -k float16",
    ),
    Mutant(
        "float16 momenta become infinite", "_transform",
        "tuple(narrow(each, old.dtype)", "tuple(each.astype(old.dtype)",
        "tests/test_transform.py -k float16",
    ),
    Mutant(
        "sums are taken in half precision", "_allocation",
        "wide = [widen(gradient) for gradient in halves(pair)]", "wide = halves(pair)",
        "tests/test_optimizers.py -k half_precision",
    ),
    Mutant(
        "inner products are taken in half precision", "_geometry",
        "wide = [widen(gradient) for gradient in gradients]", "wide = list(gradients)",
        "tests/test_geometry.py -k short_floats",
    ),
    Mutant(
        "no bias correction of the momentum", "_transform",
        "share = (1 - decays) / correction", "share = 1 - decays",
        "tests/test_transform.py -k unbiased",
    ),
    Mutant(
        "no bias correction of the second moment", "_transform",
        "root = jnp.sqrt(second_correction)", "root = jnp.ones_like(second_correction)",
        "tests/test_optimizers.py -k formula",
    ),
    Mutant(
        "no bias correction of the norms' means", "_momenta",
        "share = jnp.where(remainder == 1, 1, (1 - decay) / jnp.where(left == 1, 1, 1 - left))",
        "share = 1 - decay + 0 * remainder",
        "tests/test_allocation.py -k bias_corrected",
    ),
    Mutant(
        "eps is left out of the denominator", "_transform",
        "+ root_eps", "+ 0 * root_eps", "tests/compatibility/test_optax.py -k every_scalar",
    ),
    Mutant(
        "the second moment follows the momentum", "_transform",
        "combined(factors) ** 2", "new[0] ** 2", "tests/parity/test_variants.py -k 0.99",
    ),
    Mutant(
        "AMSGrad forgets its maximum", "_transform",
        "largest = None if largest is None else jnp.maximum(largest, second)",
        "largest = None if largest is None else second", "tests/parity/test_variants.py -k True",
    ),
    Mutant(
        "steered momentum takes the plain mean of the coefficients", "_transform",
        "sizes = allocation.sizes", "sizes = jnp.ones_like(allocation.sizes)",
        "tests/test_allocation.py -k steered",
    ),
    Mutant(
        "the weights do not reach the components", "_allocation",
        "alignment = self.weights[..., None, 1:] * self.gate", "alignment = self.gate",
        "tests/test_allocation.py -k steered",
    ),
    Mutant(
        "statistics follow the raw norms", "_transform",
        "statistics = old.after(allocation.sizes,",
        "statistics = old.after(dataclasses.replace(allocation, "
        "weights=jnp.ones_like(allocation.weights)).sizes,",
        "tests/parity/test_variants.py -k relative",
    ),
    Mutant(
        "the gate does not see the weights", "_allocation",
        "size_a = weights[..., 1:] * geometry.alignment_norm", "size_a = geometry.alignment_norm",
        "tests/test_allocation.py -k neither_loss",
    ),
    Mutant(
        "the priority gate drops too much", "_gates",
        "conflict**2 - 1) / square, 0, 1)", "conflict**2 - 1) / square - 0.01, 0, 1)",
        "tests/test_allocation.py -k neither_loss",
    ),
    Mutant(
        "the priority gate drops too little", "_gates",
        "conflict**2 - 1) / square, 0, 1)", "conflict**2 - 1) / square + 0.01, 0, 1)",
        "tests/test_allocation.py -k neither_loss",
    ),
    Mutant(
        "a spike outweighs its mean", "_weightings",
        "scale = jnp.maximum(_geometry.norms(gramian), norms)", "scale = norms",
        "tests/test_weightings.py -k spike",
    ),
    Mutant(
        "unit weights forget the recent mean", "_weightings",
        "scale = jnp.maximum(_geometry.norms(gramian), norms)", "scale = _geometry.norms(gramian)",
        "tests/test_weightings.py -k spike",
    ),
    Mutant(
        "over_pairs returns the other half", "_wrappers",
        "lambda leaf: leaf.prediction if is_pair(leaf)",
        "lambda leaf: leaf.alignment if is_pair(leaf)",
        "tests/test_wrappers.py -k half",
    ),
    Mutant(
        "over_pairs loses extra arguments", "_wrappers",
        "_first_half(params), **extra_args)", "_first_half(params))",
        "tests/test_wrappers.py -k effect",
    ),
    Mutant(
        "gdmam forgets its mask", "_optimizers",
        "optax.add_decayed_weights(weight_decay, mask)", "optax.add_decayed_weights(weight_decay)",
        "tests/test_optimizers.py -k mask",
    ),
    Mutant(
        "another default weight decay", "_optimizers",
        "weight_decay: Any = 1e-4", "weight_decay: Any = 1e-3", "tests/test_optimizers.py -k mask",
    ),
    Mutant(
        "diagnostics exchange the gates", "_diagnostics",
        '"gate": allocation.gate[..., 0, :]', '"gate": allocation.gate[..., 1, :]',
        "tests/test_diagnostics.py -k gates",
    ),
    Mutant(
        "diagnostics exchange the momenta", "_diagnostics",
        "first : first + count", "1 : 1 + count",
        "tests/test_diagnostics.py -k one_by_one",
    ),
    Mutant(
        "the released clipping forgets its window", "_released",
        "accepted = jnp.append(norms[1:],", "accepted = jnp.append(norms[:-1],",
        "tests/test_released.py -k queue",
    ),
    Mutant(
        "a leaf that is whole on an axis counts on every device", "_sharding",
        "jax.lax.pcast(term / copies,", "jax.lax.pcast(term,",
        "tests/distributed/test_sharding.py -k shard_map_the_axis",
    ),
    Mutant(
        "a solver's steps stay short", "_programmes",
        "(ahead / mean) ** 3", "0.5",
        "tests/test_weightings.py -k twenty_steps",
    ),
    Mutant(
        "a solver's result has no derivative", "_programmes",
        "return x + (change - jax.lax.stop_gradient(change))", "return x",
        "tests/test_weightings.py -k finite_differences",
    ),
    Mutant(
        "weights of a solver add up to 1 in units of the norms", "_programmes",
        "return jnp.where(lengths == least, 1, least * inverses)",
        "return jnp.ones_like(lengths)", "tests/parity/test_torchjd.py -k mgda",
    ),
    Mutant(
        "Aligned-MTL's eigenvectors are held fixed", "_weightings",
        "- divide((column * row) ** 2, column + row) * turned", "",
        "tests/test_weightings.py -k finite_differences",
    ),
    Mutant(
        "a step left out changes the allocation", "_allocation",
        "where(apply, decided, previous),", "decided,",
        "tests/test_skipping.py -k as_if",
    ),
    Mutant(
        "a step left out is remembered", "_transform",
        "wide = [jnp.where(taken[k], gradient, 0) for k, gradient in enumerate(wide)]", "pass",
        "tests/test_skipping.py -k as_if",
    ),
    Mutant(
        "a first memory holds an array twice", "_remembering",
        "jax.tree.map(jnp.copy, weighting.init(zeros))", "weighting.init(zeros)",
        "tests/compatibility/test_remembered.py -k twice",
    ),
    Mutant(
        "a step left out decays the second moment", "_transform",
        "second = second and (jnp.where(apply, second[0], 1), *second[1:])", "pass",
        "tests/test_skipping.py -k as_if",
    ),
    Mutant(
        "a step left out advances the schedule", "_optimizers",
        "*where(apply, links, [*state[1:]])", "*links",
        "tests/test_skipping.py -k as_if",
    ),
    Mutant(
        "a step left out is not counted", "_allocation",
        "jnp.where(apply, previous.skipped, more_skips(previous.skipped))", "previous.skipped",
        "tests/test_skipping.py -k as_if",
    ),
    Mutant(
        "steps left out are never forgotten", "_allocation",
        "jnp.where(finite, 0, more_skips(previous.skipped_in_a_row))",
        "more_skips(previous.skipped_in_a_row)",
        "tests/test_skipping.py -k in_a_row",
    ),
    Mutant(
        "numbers beside names go in the order of the alphabet", "_losses",
        "tuple(pair.alignment[name] for name in losses)",
        "tuple(pair.alignment[name] for name in sorted(losses))",
        "tests/test_absent.py -k as_written",
    ),
    Mutant(
        "an absent loss changes its running mean", "_momenta",
        "return jnp.where(present, share, 0), jnp.where(present, left, remainder)",
        "return share, left", "tests/test_absent.py -k wait_for_it",
    ),
    Mutant(
        "a gradient that is not finite reaches the sum", "_allocation",
        "wide = [jnp.where(taken[k], gradient, 0) for k, gradient in enumerate(wide)]", "pass",
        "tests/test_absent.py -k skip_loss",
    ),
    Mutant(
        "a line search gets the plain sum", "_optimizers",
        "factor * value, 0)", "value, 0)",
        "tests/compatibility/test_allocate.py -k line_searches",
    ),
    Mutant(
        "over_pairs lets others take leaves", "_wrappers",
        "_check_taken(taken, params)", "pass",
        "tests/compatibility/test_allocate.py -k hands_leaves",
    ),
    Mutant(
        "a constant is added to norms", "_geometry",
        "n_p, n_a = lengths[..., :1] + floor, lengths[..., 1:] + floor",
        "n_p, n_a = lengths[..., :1] + 1e-12, lengths[..., 1:] + 1e-12",
        "tests/test_scale_freedom.py -k trajectory",
    ),
    Mutant(
        "a fork's state keeps a step that is not finite", "_fork",
        "where(jnp.isfinite(allocation.norms).all(), allocation, previous)", "allocation",
        "tests/test_fork.py -k not_finite",
    ),
    Mutant(
        "a fork's state goes on from the zeros of a step that reached no copy", "_fork",
        "previous = where(lost, kinds, previous)", "pass",
        "tests/test_fork.py -k reaches_no_copy",
    ),
    Mutant(
        "a memory of all scopes is carried over as one of each", "_carrying",
        "first = axes if jnp.ndim(after) > axes else 0", "first = axes",
        "tests/test_carrying.py -k memories",
    ),
    Mutant(
        "an overflow is cut to a finite number", "_numerics",
        "jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit))", "jnp.clip(x, -limit, limit)",
        "tests/test_optimizers.py -k overflow",
    ),
    Mutant(
        "an ensemble's skipped losses are those of its members", "_diagnostics",
        "allocation.skipped_losses[..., number]", "allocation.skipped_losses[number]",
        "tests/test_diagnostics.py -k ensemble",
    ),
    Mutant(
        "a setting that is an array of JAX is compared while tracing", "_checks",
        "    value = concrete(value)\n", "",
        "tests/test_weightings.py -k array_of_jax",
    ),
    Mutant(
        "the value of a loss that is left out counts, which may be NaN", "_optimizers",
        "jnp.where(here & (factor != 0), factor * value, 0)", "factor * value",
        "tests/compatibility/test_allocate.py -k left_out",
    ),
    Mutant(
        "without any finite loss, max_skips trains on nothing", "_allocation",
        "present = jnp.where(forced, wanted, present)", "pass",
        "tests/test_skipping.py -k so_many_in_a_row",
    ),
    Mutant(
        "of two losses the projection subtracts what opposes none", "_weightings",
        "jnp.minimum(jnp.sum(gramian * wanted[None], axis=-1), 0)",
        "jnp.sum(gramian * wanted[None], axis=-1)",
        "tests/test_weightings.py -k closed_form_for_two",
    ),
    Mutant(
        "a setting in float64 changes a memory's types", "_remembering",
        "return weights, jax.tree.map(_as_before, after, memory)", "return weights, after",
        "tests/test_remembering.py -k float64_leaves",
    ),
    Mutant(
        "a fork's names are forgotten if its state was made with a number", "_fork",
        "state = dataclasses.replace(state, names=first.names)", "pass",
        "tests/test_fork.py -k made_with_a_number",
    ),
    Mutant(
        "a line search loses what else the losses are given", "_optimizers",
        "            @functools.wraps(losses_of)\n", "",
        "tests/compatibility/test_allocate.py -k hands_on",
    ),
    Mutant(
        "the laboratory takes validation rows for natural ones", PROGRAM,
        "arrays.natural[run.fold]", "arrays.validation[run.fold]", NUMBERS,
    ),
    Mutant(
        "the laboratory's rare labels count less", PROGRAM,
        "(target / arrays.frequency[run.fold])", "(target * arrays.frequency[run.fold])", NUMBERS,
    ),
    Mutant(
        "the laboratory averages all epochs", PROGRAM,
        "first = self.model.configuration.epochs // 2", "first = 0", NUMBERS,
    ),
    Mutant(
        "the laboratory tests on padding", PROGRAM,
        "arrays.labels[rows], mask, head", "arrays.labels[rows], None, head", NUMBERS,
    ),
    Mutant(
        "the laboratory exchanges head and tail", PROGRAM,
        "head=arrays.head[run.fold]", "head=~arrays.head[run.fold]", NUMBERS,
    ),
    Mutant(
        "the laboratory trains on padding", PROGRAM,
        "mask = (jnp.arange(size) < present.sum()).reshape(rows.shape)",
        "mask = jnp.ones(rows.shape, bool)", SHORT,
    ),
    Mutant(
        "the laboratory never rescales losses", PROGRAM,
        "self.method.rescale(*pair), pair", "pair, pair", SHORT,
    ),
    Mutant(
        "the laboratory forgets the factors of the alignment loss's terms", PROGRAM,
        "self.model.configuration.alignment_weight * factor",
        "self.model.configuration.alignment_weight", SHORT,
    ),
)  # fmt: skip


# What is drawn at random, and the tests that must notice it.
DRAWN = {
    "_geometry": ("tests/test_geometry.py", "tests/test_several.py"),
    "_allocation": ("tests/test_allocation.py", "tests/test_several.py", "tests/test_transform.py"),
    "_transform": ("tests/test_skipping.py", "tests/test_optimizers.py", "tests/test_transform.py"),
}
EXCHANGED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
RENAMED = {
    "minimum": "maximum", "maximum": "minimum", "ones_like": "zeros_like",
    "zeros_like": "ones_like", "any": "all", "all": "any",
}  # fmt: skip


def mistakes(node: ast.AST) -> Iterator[ast.AST]:
    """What could stand in a node's place by mistake."""
    other = copying.deepcopy(node)
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in EXCHANGED:
        other.op = EXCHANGED[type(node.op)]()
        yield other
    elif isinstance(node, ast.Compare):
        other.ops[0] = EXCHANGED[type(node.ops[0])]()
        yield other
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Attribute) and node.attr in RENAMED:
        other.attr = RENAMED[node.attr]
        yield other
    elif isinstance(node, ast.If | ast.IfExp):
        other.test = ast.UnaryOp(ast.Not(), node.test)
        yield other
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def sites(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Each mistake in the code below ``node``: whose field, which entry of it, and what instead.

    Annotations, default values, decorators and messages of errors are no code.
    """
    for name, field in ast.iter_fields(node):
        if name in ("annotation", "returns", "defaults", "kw_defaults", "decorator_list"):
            continue
        for number, child in enumerate(field if isinstance(field, list) else [field]):
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                place = number if isinstance(field, list) else None
                yield from ((node, name, place, instead) for instead in mistakes(child))
                yield from sites(child)


def draw(number: int, seed: int) -> list[Mutant]:
    """Random mistakes in the modules of ``DRAWN``, each at another place."""
    mutants = []
    for module, tests in DRAWN.items():
        source = (ROOT / "gdmam_jax" / f"{module}.py").read_text()
        tree = ast.parse(source)
        for parent, name, place, instead in sites(tree):
            holder, key = (vars(parent), name)
            if place is not None:
                holder, key = holder[name], place
            original, holder[key] = holder[key], instead
            what = f"{module}:{original.lineno} {ast.unparse(original)} -> {ast.unparse(instead)}"
            what = " ".join(what.split())[:150]
            mutants.append(Mutant(what, module, source, ast.unparse(tree), " ".join(tests)))
            holder[key] = original
    print(f"{number} of {len(mutants)} mistakes")
    return random.Random(seed).sample(mutants, number)


BASE = 10


def run_tests(copy: Path, arguments: list[str]) -> None:
    """In a process of its own, which ends with `BASE` plus pytest's code."""
    os.chdir(copy)
    for module in [name for name in sys.modules if name.split(".")[0] in ("tests", "gdmam_jax")]:
        del sys.modules[module]
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = True
    import pytest

    with open("pytest.log", "w") as log, contextlib.redirect_stdout(log):
        code = pytest.main(arguments)
    sys.exit(BASE + int(code))


def survives(mutant: Mutant, copy: Path) -> bool:
    """Whether all of the mutant's tests pass."""
    path = copy / "gdmam_jax" / f"{mutant.module}.py"
    original = path.read_text()
    if original.count(mutant.old) < 1:
        raise ValueError(f"{mutant.what}: {mutant.old!r} is not in {path.name}")
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        files, _, chosen = mutant.tests.partition(" -k ")
        arguments = ["-q", "-x", "-n0", "-p", "no:cacheprovider", *files.split()]
        arguments += ["-k", chosen] if chosen else []
        # Forked from one that has imported what takes long.
        process = multiprocessing.get_context("forkserver").Process(
            target=run_tests, args=(copy, arguments)
        )
        process.start()
        process.join()
    finally:
        path.write_text(original)
    code = (process.exitcode or 0) - BASE
    # A module that cannot be imported (2) is noticed; tests that are not there are an error.
    if code not in (0, 1, 2):
        log = (copy / "pytest.log").read_text()
        raise RuntimeError(f"{mutant.what}: pytest could not run\n{log[-2000:]}")
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-k", default="", help="only mutants whose description holds this")
    parser.add_argument("--random", type=int, default=0, help="so many random mistakes instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random ones (0)")
    arguments = parser.parse_args()
    mutants = draw(arguments.random, arguments.seed) if arguments.random else MUTANTS
    chosen = [mutant for mutant in mutants if arguments.k in mutant.what]
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["jax", "optax", "chex", "flax.nnx", "pytest"]
    )
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", "results", "__pycache__", ".*_cache", "*.png")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, mutant in enumerate(chosen, start=1):
            alive = survives(mutant, copy)
            survivors += alive
            verdict = "SURVIVED" if alive else "killed"
            print(f"{number:>3} of {len(chosen)}  {verdict:<9} {mutant.what}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
