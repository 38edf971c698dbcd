"""Data that ships with kvsim: GPUs, models and device profiles, each number with its source."""
