"""study/bench.py: what its ratios compare is the same work, and its counts are right."""

import pytest
import torch
from conftest import random_responses, two_prompts

import papo
from study import bench


@pytest.fixture
def works(monkeypatch):
    monkeypatch.setattr(bench, "PAIRS", 1)
    return bench.make_works()


def test_a_group_as_one_row_is_the_same_work(one_vlm):
    """The same log-probabilities; visible scores counted in the model's mask, and from the rule."""
    model, processor = one_vlm
    for prompt in two_prompts(processor):
        responses = random_responses(processor, [4, 1, 6])
        logps, _ = papo.group_logps(model, prompt, responses)
        for row, alone in zip(logps, bench.padded_logps(model, prompt, responses), strict=True):
            torch.testing.assert_close(row[: len(alone)], alone, atol=2e-5, rtol=1e-4)
        mask = papo.group_row(model, prompt, responses)[0]["attention_mask"]
        P = prompt["input_ids"].shape[1]
        owner = [0] * P + [1] * 4 + [2] + [3] * 6
        by_hand = sum(owner[k] in (0, owner[q]) for q in range(P + 11) for k in range(q + 1))
        assert bench.visible_scores(P, [4, 1, 6]) == int((mask == 0).sum()) == by_hand


def test_the_works_are_as_stated_and_no_response_ends_early(works):
    grids = [work.prompts(1)[0]["image_grid_thw"].prod().item() // 4 for work in works]
    text, work = works[2].model.config.text_config, works[0]
    assert grids == [4, 256, 256] and 8 * text.vocab_size == 151936
    assert [8 * text.hidden_size, 8 * text.intermediate_size] == [2048, 11008]
    given = work.model, work.processor, work.prompts(2), 3, 40
    ours, theirs = papo.sample_groups(*given), bench.generate(*given)
    assert [len(o) for group in ours for o in group] == [40] * 6 and theirs.shape == (6, 40)
    assert not torch.isin(theirs, torch.tensor(papo.vision_token_ids(work.model))).any()
    assert len({tuple(row) for row in theirs.tolist()}) == 6  # drawn, not greedy


def printed(tables, rows, capsys):
    """The Markdown tables as printed, each with as many cells in each row as columns."""
    for (title, columns, _), made in zip(tables, rows, strict=True):
        bench.print_table(title, columns.split(", "), made)
    texts = capsys.readouterr().out.split("###")[1:]
    for text in texts:
        head, rule, *lines = text.strip().splitlines()[2:]
        assert lines and {line.count("|") for line in (rule, *lines)} == {head.count("|")}
    return texts


def test_every_table_is_printed(works, capsys):
    rows = (
        bench.group_rows(works[:1], lengths=(6,), groups=(4,)),
        bench.training_steps(works[:1], questions=(1,), tokens=4),
        bench.gated_steps(works[0].model, works[0].processor, "--prompts-per-batch=2"),
        bench.sampling(works[:1], questions=(1,), tokens=4),
        [("one", "two", "three", "four")],
    )
    tables = "".join(printed(bench.TABLES, rows, capsys))
    assert tables.count("| embedded world | ") == 3


def test_trl_trains_with_one_config_on_as_many_responses_of_full_length(works, monkeypatch, capsys):
    pytest.importorskip("trl", reason="needs requirements-trl.txt", exc_type=ImportError)
    import papo_trl

    ours, theirs, compute_loss = [], [], papo_trl.PAPOTrainer._compute_loss
    papo_step = papo.papo_step

    def step(model, optimizer, config, groups, *rest):
        ours.append((vars(config), [len(o) for group in groups for o in group.responses]))
        return papo_step(model, optimizer, config, groups, *rest)

    def loss(self, model, inputs):
        theirs.append((vars(self.papo), inputs["completion_mask"].sum(1).tolist()))
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(papo, "papo_step", step)
    monkeypatch.setattr(papo_trl.PAPOTrainer, "_compute_loss", loss)
    rows = bench.trl_steps(works[:1], questions=(1,), tokens=4)
    assert "| embedded world | 1 x 8 x 4 | " in printed([bench.TRL_TABLE], [rows], capsys)[0]
    assert ours == theirs and [lengths for _, lengths in ours] == [[4] * 8] * 2


def test_without_trl_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--trl"])
    assert "--trl needs trl: pip install -r requirements-trl.txt\n" in capsys.readouterr().err
