"""From a checkpoint to a described module: its weights, what its outputs mean, and its digest.

These modules read no pictures. May import the files at the top of the package.
"""
