"""A launch that begins while the one before it ends (compute capability 9.0 and newer).

A kernel launched with `launch_pdl` may start before its predecessor in the stream has ended: as soon as each of its
programs has called `let_next_begin` or ended.  Until `wait_for_previous` it must not touch global memory: what it reads
may not have been written yet, and what it writes may still be read.  It may have lines brought into the L2 cache
(`fetch`): that is where what the kernel before it writes goes too.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

WAIT = "{ griddepcontrol.wait; mov.b32 $0, 0; }"
_WAIT = gl.constexpr(WAIT)
_BEGIN = gl.constexpr("{ griddepcontrol.launch_dependents; mov.b32 $0, 0; }")
_FETCH = gl.constexpr("{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }")


@gluon.jit
def wait_for_previous(thread):
    """`thread` gives the instruction its shape."""
    gl.inline_asm_elementwise(_WAIT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def let_next_begin(thread):
    gl.inline_asm_elementwise(_BEGIN, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch(address):
    """Bring what is at an int64 address into the L2 cache."""
    gl.inline_asm_elementwise(_FETCH, "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1)
