"""Several processes that answer users on one port, and one that owns what they serve.

    supervisor: registry, engine, operators' socket, checks, trials     worker 1 … N: users' requests, 1/N of the limits

A worker joins over a unix socket. It is told of routes and readiness, and says when it has taken them over; it tells
which versions its requests run on. Each lives as long as its connection.
"""
