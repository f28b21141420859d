"""Several processes that answer users on one port, and one that owns everything they serve.

    supervisor: registry, engine, operators' socket, checks, trials     worker 1 … N: users' requests, 1/N of the limits

A worker joins over a unix socket. It gets routes and readiness, and reports when it has applied them; it reports the
versions of its requests. Each lives as long as its connection.
"""
