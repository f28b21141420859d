"""The named rules: one half-row of the trade-off table, or one requirement, asked of one variant. Pure.

Every rule has three outcomes; inconclusive never passes. A rule of a technique is judged on what isolates it: the
variant against the same variant without it, a merge or a baked prompt against the unmerged adapter.
"""
