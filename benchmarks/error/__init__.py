"""How far 4-bit weights, a layer's outputs and a whole model are off, beside the theory and beside a rival.

`distributions.py` and `theory.py` know nothing of qkernels: they derive tables and expected errors from definitions.
`formats.py` runs the real quantizers, `statistics.py` measures, `check.py` compares the two and refuses.
"""
