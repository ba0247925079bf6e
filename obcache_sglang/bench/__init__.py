"""What compression buys: `python -m obcache_sglang.bench`."""
