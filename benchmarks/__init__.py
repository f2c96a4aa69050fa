"""The asv suite: how long the engine's parts take, commit by commit. Never the source of a figure.

asv runs today's files on old builds, so these use public names of znn alone, and a benchmark whose names a build lacks is
skipped. Networks, with their threads, are made in `setup`: made at import they would hang asv's fork server. Every
benchmark compares its answer with the float64 reference on a small case before it is timed.
"""
