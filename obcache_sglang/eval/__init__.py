"""What compression does to answers: `python -m obcache_sglang.eval`."""
