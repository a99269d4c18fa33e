"""The soak benchmark, short: a good optimizer holds, and each fault is seen."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest
from typer.testing import CliRunner

pytest.importorskip("rich")
from benchmarks import soak
from benchmarks.__main__ import app

# Compilation is all the time there is, so without what makes a program fast.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def test_a_short_soak_holds_and_a_drifting_update_is_seen():
    good = soak.OPTIMIZERS["gdmam"]()

    def update(updates, state, params=None):
        # Adds a thousandth in float32 only, from step 1,500 on.
        updates, state = good.update(updates, state, params)
        late = (state[0].count > 1500) & (jax.tree.leaves(updates)[0].dtype == jnp.float32)
        return jax.tree.map(lambda u: jnp.where(late, 1.001, 1).astype(u.dtype) * u, updates), state

    drifting = optax.GradientTransformation(good.init, update)
    with jax.enable_x64(True):
        rows = {
            row["quantity"]: row for row in soak.run(drifting, "float32", 2000, "short", OPTIONS)
        }
    seen = rows.pop("update off float64")
    assert seen["second tenth"] < seen["at most"] < 5e-4 < seen["last tenth"]
    assert seen["held"] == "NO"
    assert {row["held"] for row in rows.values()} == {"yes", "-"}
    assert 0.9 < rows["mean norm over largest norm"]["last tenth"] <= 1
    # Float32 rounds: a comparison with itself would show nothing.
    assert rows["momenta off float64"]["last tenth"] > 1e-9
    assert rows["parameters off own float64"]["last tenth"] > 1e-9
    assert rows["compilations"]["ever"] == 1


@pytest.mark.parametrize(("value", "held", "code"), [(0.5, "yes", 0), (float("nan"), "NO", 1)])
def test_the_command_fails_where_a_bound_breaks(tmp_path, monkeypatch, value, held, code):
    row = soak._row("quantity", [0.0] * 99 + [value], 1)
    assert row["held"] == held
    monkeypatch.setattr(soak, "benchmark", lambda *arguments: [row])
    output = tmp_path / "soak.json"
    result = CliRunner().invoke(app, ["soak", "--steps", "250", "--output", str(output)])
    assert result.exit_code == code, result.output
    assert json.loads(output.read_text())["title"] == "soak, 200 steps"
