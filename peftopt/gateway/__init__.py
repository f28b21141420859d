"""serve: a gateway before an engine's server. It knows which weights answer, and refuses what it cannot carry in time.

    app      requests of users: checked, admitted, routed, passed through, written down
    admin    requests of operators: adapters put, promoted, rolled back, removed

`admission` who may go on, `routes` which version answers, `frames` what a stream says, `limits` how much is carried and
`keys` who may ask are pure. `upstream` talks to the engine, `lines` and `metrics` keep the account, `registry` keeps
the adapters on disk, `lives` takes them from a folder to live traffic, `backends` starts engines, `run` all of it.
"""
