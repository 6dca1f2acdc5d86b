"""Finetuning: data, adapters, loss, loop, checkpoints and merge."""
