"""serve: a gateway before an engine's server. It knows which weights answer, and refuses what it cannot carry in time.

    run      from start to end: the engine, both applications, what runs beside them
    app      requests of users: checked, admitted, routed, passed through, written down
    admin    requests of operators: adapters put, promoted, rolled back, removed

`lives` takes an adapter from its folder to users, with `fingerprints` and the `registry` on disk. `backends` starts
engines, `upstream` asks them, `decided` reads a run. `lines` and `metrics` keep the account. `admission` who may go on,
`limits`, `routes` which version answers, `frames` what a stream says, `keys`, `errors` and `trial` are pure.
"""
