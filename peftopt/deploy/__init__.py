"""Files that others start a gateway by: gunicorn, systemd, Compose, Kubernetes. Pure: nothing is read or started.

`deployed` what is deployed, `times` how long its end may take, `files` the files of each target.
"""
