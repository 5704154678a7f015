"""Sharded training: what FSDP2 and ZeRO divide, and how full weights are written and read."""
