"""Figures, files and pages of explanations, and which images are finished.

These modules work without torch.
May import the files at the top of the package, `data/` and `checks/`.
"""
