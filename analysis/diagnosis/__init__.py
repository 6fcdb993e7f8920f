"""What went wrong in a run: findings with their evidence, and what was checked."""
