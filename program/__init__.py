"""What train_small.py stands on; this much its rooms share."""

SAMPLES = 8  # responses per question in every evaluation: the 8 of avg@8 and pass@8


class UserError(ValueError):
    """Something the user typed or fed in that cannot work: shown as one line, exit code 2."""
