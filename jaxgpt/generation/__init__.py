"""Text generation: sampling, decoding with a cache, and a server."""
