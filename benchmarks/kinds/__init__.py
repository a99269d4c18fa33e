"""Kinds of problems with two losses: a small one of each, trained by several methods."""
