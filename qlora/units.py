"""Units of memory, in bytes.

Room: the two names; nothing else.
"""

MIB = 2**20
GIB = 2**30
