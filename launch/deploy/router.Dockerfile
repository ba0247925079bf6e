# docker build --file launch/deploy/router.Dockerfile --tag obcache-router launch/deploy
FROM python:3.11-slim

RUN python3 -m pip install --no-cache-dir sglang-router==0.3.2 && useradd --create-home --uid 10001 router
USER 10001
EXPOSE 30000 29000
# Without the circuit breaker, which counts refused requests too: ten wrong ones of one client close a replica to everybody for a minute.
# Replicas that end are found by health checks.
ENTRYPOINT ["python3", "-m", "sglang_router.launch_router", "--host", "0.0.0.0", "--port", "30000", "--policy", "cache_aware", \
    "--disable-circuit-breaker"]
