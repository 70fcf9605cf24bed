"""Evaluates a run, whose training must be finished, and writes its report, as a job of a Ray cluster:

ray job submit --working-dir . -- python jobs/evaluate.py --config configs/demo.yaml --run s3://bucket/runs/demo
"""

from vas.cli.job import run_job

if __name__ == "__main__":
    run_job("evaluate", about=__doc__)
