"""What is computed: targets, paths, rules, the integral, and the methods.

Knows no files of pictures. May import the files at the top of the package, `network/` and
`engine/`.
"""
