"""Throughput: one measuring protocol for pytest and the command line, and typed rows.

machine -> statistics -> verdict, noise -> baseline -> feed, process -> calls, timing, clocks, operations -> row
-> outputs, plausible -> protocol -> rows

Every row is measured by `protocol.measure`; `rows` takes what that needs from the chain.
"""
