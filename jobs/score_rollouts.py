"""Scores the responses of a finished run with another config's rewards, without sampling them again, as a job of a
Ray cluster. What they become is a run of its own, ready to train on:

ray job submit --working-dir . -- python jobs/score_rollouts.py --config mine.yaml --from s3://bucket/runs/demo
"""

from vas.cli.job import run_job

if __name__ == "__main__":
    run_job("rollouts", about=__doc__, source=True)
