"""Memory: what evaluation keeps, and the estimate of a run's peak against measured sizes."""

import torch
from conftest import picture

import papo
import train_small as ts

ROWS = [{"images": [picture(i, 84, 56)], "problem": "What?", "answer": "7"} for i in range(6)]
CONFIG = papo.PAPOConfig(group_size=2, max_new_tokens=3, prompts_per_sample=4)


def test_evaluation_keeps_no_pixels(one_vlm):
    for group in ts.evaluate(*one_vlm, CONFIG, ROWS):
        assert group.prompt is None and not {"images", "prompt"} & set(group.row)
    assert all(set(row) == {"images", "problem", "answer"} for row in ROWS)


def test_kept_prompts_change_nothing_and_are_made_once(one_vlm, monkeypatch):
    """Plain and masked, with room for all rows, for some of them and for none: the same answers; and where there is room, no
    second call of the processor."""
    calls, encode = [], ts.encode_prompt
    monkeypatch.setattr(ts, "encode_prompt", lambda *a: (calls.append(1), encode(*a))[1])
    state = torch.Generator().get_state()
    one = sum(t.nbytes for t in encode(one_vlm[1], "What?", ROWS[0]["images"][0]).values()) + state.nbytes

    def answers(encoded):
        return [
            [
                o.tolist()
                for group in ts.evaluate(*one_vlm, CONFIG, ROWS, masked=m, encoded=encoded)
                for o in group.responses
            ]
            for m in (False, True)
        ]

    expected = answers(None)
    for rows_kept in (12, 7, 0):
        encoded = ts.EncodedRows(room=one * rows_kept)
        for made in (12, 12 - rows_kept):
            calls.clear()
            assert answers(encoded) == expected
            assert len(calls) == made
        assert len(encoded.kept) == rows_kept and encoded.room == 0
