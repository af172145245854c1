"""Behind the user's module `integrated_gradients`: the folders follow the way of an image.

What each folder holds and may import stands in CONTRIBUTING.md. Users import from
`integrated_gradients`, never from here.
"""

__version__ = '1.0.0'

# The number of results of this kind. Raise it whenever a figure or a map changes: what was computed
# before is then computed again. A new version that changes no figure leaves it as it is.
RESULTS = 2
