"""Our own engines behind OpenAI's API, for machines without another server: `python -m peftopt.server`.

a body -> `asked` checks it -> `scheduler` queues it, and one thread computes -> `answer` makes tokens text
    -> `replies` gives them OpenAI's form -> `app` sends them
"""
