"""What train_small.py stands on; in this file, what its modules share."""

from pathlib import Path

import datasets
import huggingface_hub
from transformers import HfArgumentParser

SAMPLES = 8  # responses per question in every evaluation: the 8 of avg@8 and pass@8
# The sizes of a step that suit the embedded world; the dataclasses have the published ones.
TOY_SIZES = dict(group_size=8, prompts_per_batch=16, updates_per_batch=2, max_new_tokens=64)
TOY_SIZES |= dict(learning_rate=1e-4)


class UserError(ValueError):
    """Something the user typed or fed in that cannot work: shown as one line, exit code 2."""


class Parser(HfArgumentParser):
    """A flag for each field of the dataclasses; what is wrong raises UserError."""

    def error(self, message):
        raise UserError(message)  # argparse would print the whole usage first


def ask_hub(name):
    """Without a network look a name up in the cache only, instead of asking six times per file."""
    if Path(name).exists() or huggingface_hub.is_offline_mode():
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
        print(f"{name}: from the hub, unless it is in its cache")
    except Exception:  # no name server, no route, no answer: each has an error of its own
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def cannot_load(flag, name, error):
    """The UserError for a library's own error, of which there are many: its message says which."""
    hint = " (is there a network? The embedded world runs offline)" * (not Path(name).exists())
    return UserError(f"{flag} {name}: cannot be loaded{hint}: {type(error).__name__}: {error}")
