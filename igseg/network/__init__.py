"""From a checkpoint to a described module: its weights, what its outputs mean, which one it is.

Knows no files of pictures. May import the files at the top of the package.
"""
