"""Architectures: a transformer described by data, run by pure functions of a nested dict of arrays."""
