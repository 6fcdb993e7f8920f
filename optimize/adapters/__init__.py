"""LoRA: which modules, adapter folders, merging."""
