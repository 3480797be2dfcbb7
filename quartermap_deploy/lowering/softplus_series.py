"""Softplus without a logarithm, for GPU runtimes.

A compiler for GPUs may take the hardware's fast logarithm, whose error near 1 is absolute, 2e-7: at a step of 0.01
that is a relative error of 2e-5, whichever way the logarithm's argument was formed. Here only the exponential is left
to the compiler, whose fast form has a relative error of a few 1e-7.
"""

from __future__ import annotations

from quartermap_deploy.lowering.writer import Value, Writer, scalar

COEFFICIENTS = (0.33333158, 0.20012427, 0.13980709, 0.14087329)
"""artanh(s)/s = 1 + t·(c0 + t·(c1 + …)) with t = s², on 0 ≤ s ≤ 1/3: Chebyshev nodes, relative error 4e-9."""


def write_softplus_series(write: Writer, z: Value) -> Value:
    """Append softplus(z) = max(z, 0) + log(1 + e^-|z|) for a float32 tensor and return its name.

    log(1 + u) = 2·artanh(s) with s = u/(u + 2) (Abramowitz and Stegun 4.6.22), and s is at most 1/3. Nothing overflows.
    """
    u = write("Exp", write("Neg", write("Abs", z)))
    s = write("Div", u, write("Add", u, scalar(2.0)))
    t = write("Mul", s, s)
    *others, tail = COEFFICIENTS
    series: Value = write("Mul", t, scalar(tail))
    for coefficient in reversed(others):
        series = write("Mul", t, write("Add", series, scalar(coefficient)))
    twice = write("Add", s, s)
    log = write("Add", twice, write("Mul", twice, series))
    return write("Add", write("Max", z, scalar(0.0)), log)
