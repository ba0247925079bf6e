"""OBCache KV-cache compression for shared prefixes, inside a running SGLang server."""

__version__ = "0.1.0"
