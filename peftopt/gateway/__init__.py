"""serve: a gateway before an engine's server. It routes requests to versions, and refuses those that it cannot answer
in time.

    run      from start to end: the engine, both applications, what runs beside them
    app      requests of users: checked, admitted, routed, forwarded, logged
    admin    requests of operators: adapters put, promoted, rolled back, removed

`lives` takes an adapter from its folder to users, with `fingerprints` and the `registry` on disk. `backends` starts
engines, `upstream` sends them requests, `decided` reads a run. `lines` and `metrics` record requests. `admission` (the
queues), `limits`, `routes` (names to versions), `frames` (parts of a stream), `keys`, `errors` and `trial` are pure.
"""
