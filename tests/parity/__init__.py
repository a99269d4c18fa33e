"""Parity of both forms of GDMAM with plain PyTorch, and with trajectories of the released code."""
