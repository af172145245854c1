"""Figures, files and pages of what was found, and which images are finished.

Needs no torch. May import the files at the top of the package, `data/` and `checks/`.
"""
