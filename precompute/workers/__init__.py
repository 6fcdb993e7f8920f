"""Several workers on one folder: in processes here, on Ray, on Slurm."""
