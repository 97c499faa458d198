"""Throughput: one measuring protocol for pytest and the command line, and typed rows.

machine -> statistics -> verdict, noise -> baseline -> feed, process -> calls, timing, clocks, operations -> row
-> outputs, plausible -> protocol -> rows

`protocol.measure` is the path that every row takes; `rows` puts together what it needs of the chain.
"""
