"""The commands: one file each, which the command line finds by its name.

A file's docstring is the help of its command, and ``command`` in it is that of click. ``dpo-opt --help``
reads the docstrings and imports none of the files. Heavy imports stay inside the bodies.
"""
