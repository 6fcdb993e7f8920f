"""Many training runs from one cache: a grid of settings, a process for each run, one table."""
