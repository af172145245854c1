"""Pictures: from a file to pixels and labels, and how datasets lie in folders.

Needs no torch and knows no networks. May import the files at the top of the package.
"""
