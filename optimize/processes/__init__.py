"""Training on several processes (GPUs): how they meet and exchange numbers; parameters sharded by FSDP."""
