"""Draws docs/conflict_report.png: `conflict_report` of a VAE that is trained on its ELBO."""

from pathlib import Path

import jax
import optax

import gdmam_jax as gdmam
from benchmarks.kinds.images import vae
from gdmam_jax.plotting import conflict_report

HERE = Path(__file__).parent


def main(steps: int = 1000) -> None:
    """Train, report, draw."""
    kind = vae()
    optimizer = gdmam.weighed(optax.adam(1e-2), gdmam.sum_weighting)

    def losses(params, batch):
        found = kind.features(params, batch)
        return kind.prediction(params, found, batch), kind.alignment(params, found, batch)

    def step(carry, key):
        params, state = carry
        _, pairs = gdmam.value_and_paired_grad(losses)(params, kind.sample(params, key))
        updates, state = optimizer.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), gdmam.diagnostics(state)

    params = kind.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), steps)
    _, history = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    report = conflict_report(history)
    print(report.verdict)
    report.figure.savefig(HERE / "conflict_report.png", dpi=90)


if __name__ == "__main__":
    main()
