"""Capacity planning: which policy, how many of which GPU, at what cost and risk (`kvsim plan`)."""
