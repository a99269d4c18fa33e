"""Tests, and the references they compare with; mirrors the package."""
