"""GDMAM for JAX: train on a prediction loss and an alignment loss that may conflict."""
