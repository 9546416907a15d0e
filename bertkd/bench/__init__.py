"""Benchmarks: what bertkd gains on this machine against what one would use instead.

One case is an op at a shape and dtype, or a whole training step. Every contestant of a case is verified against the
float64 reference before it is timed, all take turns, and each measurement is one row of a CSV file, from which the
Markdown summary, the plots and the README's figures are made. Run by ``bertkd bench``, or ``python -m bertkd.bench``
where only torch is installed.
"""
