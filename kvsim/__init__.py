"""kvsim: what a KV-cache compression policy will do on your GPU, model and traffic, before deployment."""
