"""Measurements of bop2nd_fast against its baselines; see README.md. Not part of the installed package."""
