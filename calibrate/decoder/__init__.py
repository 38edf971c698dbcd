"""A real decoder in torch whose paged cache every policy compresses for real: what simulations are held against.

`weights.py` (random or Hugging Face safetensors), `transformer.py` (the forward pass), `cache.py` over `storage.py` (paged blocks
of one KV head each), `rules/` (what each policy does to a cache), `decoder.py` (sequences through all of it). Decode steps are
staged in `decode_batch.py`, attended by `torch_attention.py` or `triton_attention.py`, and replayed by `graphs.py`.
"""
