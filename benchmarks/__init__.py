"""QueriesPool beside other pools, in figures: ``python -m benchmarks``.

What is compared takes turns, within seconds of each other, and what counts are the ratios: the machine
may be fast or slow, and busy with something else, but it is so for all.  Each group of cells has a module,
which says what it measures and what must be reached.
"""
