# docker build --file launch/deploy/router.Dockerfile --tag obcache-router launch/deploy
FROM python:3.11-slim

RUN python3 -m pip install --no-cache-dir sglang-router==0.3.2 && useradd --create-home --uid 10001 router
USER 10001
EXPOSE 30000 29000
# No circuit breaker: it counts refused requests too, and ten wrong ones of one client close a replica to everybody for a minute.
# Retries (12 attempts, 11 s) last longer than the health checks need to see that a replica is dead (5 s): obcache_sglang/docs/routers.md.
ENTRYPOINT ["python3", "-m", "sglang_router.launch_router", "--host", "0.0.0.0", "--port", "30000", "--policy", "cache_aware", \
    "--disable-circuit-breaker", "--health-check-interval-secs", "1", "--retry-max-retries", "12", \
    "--retry-initial-backoff-ms", "100", "--retry-max-backoff-ms", "2000"]
