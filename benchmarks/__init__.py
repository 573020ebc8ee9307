"""Benchmarks of every operator and method: one file each, with `cases` and `sized`.

Installs as ddfast.benchmarks.
"""
