"""Measurements beside other libraries.  Nothing imports this package; run it from the repository's root.

python -m benchmarks.bloom7b1 --help
"""
