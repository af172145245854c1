"""Whether a map can be trusted: the checks, and what their figures mean in words.

May import the files at the top of the package, `network/`, `engine/` and `method/`.
"""
