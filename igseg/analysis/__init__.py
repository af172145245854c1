"""One image and many images: here pictures and gradients meet.

May import the files at the top of the package, `data/`, `network/`, `engine/`, `method/`, `checks/`
and `results/`.
"""
