"""Pictures: from a file to pixels and labels, and how datasets lie in folders.

These modules work without torch and without networks.
May import the files at the top of the package.
"""
