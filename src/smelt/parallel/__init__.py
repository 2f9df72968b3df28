"""Process groups and pipeline schedules. Training on several processes is accelerate's and torch's business (see train.py)."""
