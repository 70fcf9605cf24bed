"""Runs all stages, as a job of a Ray cluster; submitted again, it goes on where it stopped:

ray job submit --working-dir . -- python jobs/pipeline.py --config configs/demo.yaml --run s3://bucket/runs/demo
"""

from vas.cli.job import run_job

if __name__ == "__main__":
    run_job("all", about=__doc__)
