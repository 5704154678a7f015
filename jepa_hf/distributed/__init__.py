"""Sharded training: full state dicts under FSDP2 and ZeRO."""
