"""Measure networks and competitors; a measurement becomes a record, and only records become figures.

Modules that only read records (record, store, stats, claims, report) use nothing of znn outside this package
and no
compiled code, so that figures regenerate on a machine without a compiler.
"""
