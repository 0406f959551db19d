"""FX graph in, FX graph out: one pass per file. Nothing here imports ``runtime``."""
