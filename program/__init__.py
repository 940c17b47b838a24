"""What train_small.py stands on; this much its rooms share."""

from pathlib import Path

import datasets
import huggingface_hub

SAMPLES = 8  # responses per question in every evaluation: the 8 of avg@8 and pass@8


class UserError(ValueError):
    """Something the user typed or fed in that cannot work: shown as one line, exit code 2."""


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
