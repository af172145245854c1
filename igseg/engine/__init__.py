"""Many gradients of a network, fast and exact: its graph, crops, memory and precision.

Does not know what they are for. May import the files at the top of the package and `network/`.
"""
