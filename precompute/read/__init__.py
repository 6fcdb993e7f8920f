"""Data as people have it, to pairs: files, formats, rows."""
