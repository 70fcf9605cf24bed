"""Puts a run's models, or what a YAML file says, behind an endpoint on the cluster, and leaves it running there, as a
job of a Ray cluster; submitted again, the new version takes the old one's place with no failed request:

ray job submit --working-dir . -- python jobs/serve.py --run s3://bucket/runs/demo --set replicas.max=4
"""

from vas.cli.job import run_serve

if __name__ == "__main__":
    run_serve(about=__doc__)
