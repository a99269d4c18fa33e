"""Physics-informed networks: several ways to train on two losses that fight, side by side."""
