"""Which of GDMAM's choices suit a data set, judged on rows used neither for training nor testing.

Each variant changes one choice of GDMAM's default, with AMSGrad. All train by the protocol of the
label distribution laboratory, with every learning rate of the grid. They are compared by their KLD
at the last epoch on natural rows: rows of the training folds that the imbalance sampler left out.

    python examples/ldl_choices.py --data films --out results/choices

To try a variant of your own, add a line to `VARIANTS` under a new name: a name whose results are in
the folder is not trained again.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import optax
from rich.console import Console
from rich.table import Table

import gdmam_jax as gdmam
from gdmam_jax.ldl import data
from gdmam_jax.ldl.laboratory import experiment, methods, results, selection
from gdmam_jax.ldl.laboratory.protocol import Configuration


def two_groups(path: str) -> str:
    """The layers that only the alignment loss trains, apart from the others."""
    own = ("encoder_y", "encoder_x_mean", "encoder_x_log_variance")
    return "alignment" if any(name in path for name in own) else "prediction"


def variant(
    name: str,
    *,
    clip: float | None = None,
    terms: tuple[float, float, float] = (1.0, 1.0, 1.0),
    similarity: str = "mean",
    **choices: object,
) -> methods.Method:
    """The default with other choices, with clipping before it, or with other alignment terms."""
    make = partial(gdmam.gdmam, **({"amsgrad": True} | choices))

    def optimizer(rate: float) -> optax.GradientTransformation:
        return (
            make(rate) if clip is None else optax.chain(optax.clip_by_global_norm(clip), make(rate))
        )

    return methods.Method(name, name, optimizer, alignment_weights=terms, similarity=similarity)


VARIANTS = [
    variant("default"),
    *(
        variant(f"preference{factor:g}", weighting=gdmam.unit_weighting(preference=factor))
        for factor in (0.5, 2.0, 4.0, 16.0)
    ),
    variant("w-norm", weighting=gdmam.norm_weighting),
    variant("w-balanced", weighting=gdmam.balanced_weighting),
    variant("w-pcgrad", weighting=gdmam.pcgrad_weighting, gate=gdmam.open_gate),
    variant("w-sum", weighting=gdmam.constant_weighting(1.0, 1.0)),
    variant("per-leaf", scope=gdmam.leaf_scope),
    variant("two-groups", scope=two_groups),
    variant("g-open", gate=gdmam.open_gate),
    variant("g-conflict", gate=gdmam.conflict_gate),
    variant("g-cosine", gate=gdmam.cosine_gate),
    variant("m-relative", momentum=gdmam.relative_momentum),
    variant("m-ratcheted", momentum=gdmam.ratcheted_momentum),
    variant("separate", momentum=gdmam.relative_momentum, momenta="separate"),
    variant("adam", amsgrad=False),
    variant("clip1", clip=1.0),
    variant("sim-sum", similarity="sum"),
    variant("no-recovery", terms=(0.0, 1.0, 1.0)),
    variant("no-target", terms=(1.0, 0.0, 1.0)),
    variant("no-similarity", terms=(1.0, 1.0, 0.0)),
]
BASELINES = ["rda", "pcgrad", "equal-norm", "ofr-db", "gdmam-released"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="films", help="films, a registered set's name, or a file")
    parser.add_argument("--data-folder", type=Path, help="where registered sets lie")
    parser.add_argument(
        "--normalize", action="store_true", help="divide rows of labels by their sum"
    )
    parser.add_argument("--drop-constant", action="store_true", help="leave out constant features")
    parser.add_argument("--out", type=Path, required=True, help="results; resumed if there are any")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="two or more to try"
    )
    parser.add_argument("--variants", nargs="+", help="names of variants to train (all)")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=300)
    args = parser.parse_args()

    if len(args.rates) < 2:
        parser.error("--rates: give two or more")
    known = {method.name: method for method in VARIANTS}
    if unknown := set(args.variants or ()) - set(known):
        parser.error(f"unknown variants {sorted(unknown)}; expected some of {', '.join(known)}")
    chosen = [known[name] for name in args.variants or known]
    chosen += [methods.find(name) for name in BASELINES]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*renormalised")
        try:
            dataset = data.find(
                args.data,
                folder=args.data_folder,
                normalize=args.normalize,
                drop_constant=args.drop_constant,
            )
            configuration = Configuration(
                folds=args.folds, seeds=1, epochs=args.epochs, learning_rates=tuple(args.rates)
            )
        except (ValueError, OSError) as error:
            parser.error(str(error))
    console = Console()
    try:
        with console.status("") as status:

            def progress(label: str, done: int, total: int) -> None:
                status.update(f"{label}: {done} of {total} epochs")

            experiment.run(dataset, chosen, configuration, folder=args.out, progress=progress)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    table = Table(
        title=f"{dataset.name}: KLD on natural rows, last epoch",
        caption="rate: the one with the lowest KLD at the last epoch on the rows it is tuned on",
    )
    for column in ("variant", "tuned on validation rows", "rate", "tuned on natural rows", "rate "):
        table.add_column(column, justify="left" if column == "variant" else "right")
    found = {result.name: result for result in results.load(args.out).methods}
    for method in chosen:
        cells = []
        for rows in ("validation", "natural"):
            trial = found[method.name].trial("last", rows)
            score = selection.score(found[method.name].trials[trial], "last", "natural")
            cells += [f"{score:.4f}", trial]
        table.add_row(method.name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
