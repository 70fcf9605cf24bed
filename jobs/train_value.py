"""Fits the value model to a run's rollouts, which must be finished, as a job of a Ray cluster:

ray job submit --working-dir . -- python jobs/train_value.py --config configs/demo.yaml --run s3://bucket/runs/demo
"""

from vas.cli.job import run_job

if __name__ == "__main__":
    run_job("train", about=__doc__)
